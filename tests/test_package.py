"""The package as users get it: wheel and sdist are built, installed apart, and asked to work."""

import email
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import finespun

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INFO = f"finespun-{finespun.__version__}.dist-info"


def called(*command: str | Path, cwd: Path, **env: str) -> str:
    """What a program prints. Its error is shown where it fails."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    called(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed and nothing else; dependencies come from this Python."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    called(*pip, "--target", folder, built[0], cwd=folder)
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    held = contents(built[0])
    own = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "finespun").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    about = {"METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "RECORD"}
    assert held.keys() == own | {f"{INFO}/{name}" for name in about}
    assert "finespun/py.typed" in held
    assert "finespun/report/page.css" in held
    assert held[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_metadata_is_what_the_project_says(built: tuple[Path, Path]) -> None:
    said = email.message_from_bytes(contents(built[0])[f"{INFO}/METADATA"])
    assert said["Name"] == "finespun"
    assert said["Version"] == PROJECT["version"] == finespun.__version__
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.11"
    assert set(said.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    needed = [text for text in said.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert {text.split(">")[0] for text in needed} == {"torch", "safetensors", "numpy"}
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    readme = (ROOT / "README.md").read_text(encoding="utf-8").strip()
    payload = said.get_payload(decode=True)
    assert isinstance(payload, bytes)
    assert payload.decode().strip() == readme


def test_the_sdist_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    for name in ("tests/suite.py", "docs/index.md", "examples/trec-lsr.yaml", "Makefile"):
        assert f"{folder.name}/{name}" in names
    assert not [name for name in names if "__pycache__" in name or "/.venv" in name]
    called(sys.executable, "-m", "hatchling", "build", "-t", "wheel", cwd=folder)
    [again] = (folder / "dist").glob("*.whl")
    assert contents(again) == contents(wheel)


def test_what_is_installed_imports_and_runs(installed: Path, tmp_path: Path) -> None:
    place = {"PYTHONPATH": str(installed)}
    code = (
        "import torch, finespun as fs; print(fs.__file__); "
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8)); "
        "adapter = fs.adapt(model, fs.LSR(rank=2, separation_rank=1), ['0'], train=[]); "
        "adapter.save('saved'); adapter.detach(); "
        "print(fs.load(model, 'saved').num_parameters, fs.__version__)"
    )
    where, what = called(sys.executable, "-c", code, cwd=tmp_path, **place).splitlines()
    assert Path(where).parent == installed / "finespun"
    assert (
        what == f"{finespun.LSR(rank=2, separation_rank=1).numbers(shape())} {PROJECT['version']}"
    )


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "finespun"
    place = {"PYTHONPATH": str(installed)}
    assert "Usage: finespun" in called(command, "--help", cwd=tmp_path, **place)


def shape() -> finespun.structures.SiteShape:
    return finespun.structures.SiteShape("0", 8, 8)
