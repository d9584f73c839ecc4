"""The package as users get it: wheel and sdist are built, installed apart, and asked to work."""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import finespun
from finespun.cli.missing import EXTRAS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INFO = f"finespun-{finespun.__version__}.dist-info"
CLEAN = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}  # nothing of the Python that runs the tests
WORK = (
    "import torch, finespun as fs; print(fs.__file__); "
    "model = torch.nn.Sequential(torch.nn.Linear(8, 8)); "
    "adapter = fs.adapt(model, fs.LSR(rank=2, separation_rank=1), ['0'], train_modules=[]); "
    "adapter.save('saved'); adapter.detach(); "
    "print(fs.load(model, 'saved').num_parameters, fs.__version__)"
)


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
    assert said["Version"] == finespun.__version__
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


def works(python: str | Path, site: Path, cwd: Path, **env: str) -> None:
    """A model is adapted, saved and loaded by the package that lies in `site`."""
    where, what = called(python, "-c", WORK, cwd=cwd, **env).splitlines()
    assert Path(where).parent == site / "finespun"
    numbers = finespun.LSR(rank=2, separation_rank=1).num_parameters(shape())
    assert what == f"{numbers} {finespun.__version__}"


@pytest.mark.slow
def test_what_is_installed_imports_and_runs(installed: Path, tmp_path: Path) -> None:
    works(sys.executable, installed, tmp_path, PYTHONPATH=str(installed))


@pytest.mark.slow
def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "finespun"
    place = {"PYTHONPATH": str(installed)}
    assert "Usage: finespun" in called(command, "--help", cwd=tmp_path, **place)


def shape() -> finespun.contract.SiteShape:
    return finespun.contract.SiteShape("0", 8, 8)


# --- an environment of its own -------------------------------------------------------------------
class Environment:
    """A virtual environment of Python 3.11, where there is one, without anything in it."""

    def __init__(self, folder: Path) -> None:
        found = None if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
        called(found or sys.executable, "-m", "venv", folder, cwd=folder.parent)
        self.bin, self.cwd = folder / "bin", folder.parent
        self.site = Path(self("python", "-c", "import site; print(site.getsitepackages()[0])"))

    def __call__(self, program: str, *arguments: str | Path) -> str:
        """What one of its programs prints."""
        return called(self.bin / program, *arguments, cwd=self.cwd, **CLEAN).strip()

    def install(self, *what: str | Path) -> None:
        """Install as `make install` does: from the index, at the versions of constraints.txt."""
        versions = ROOT / "constraints.txt"
        self("python", "-m", "pip", "install", "-q", "--no-compile", "-c", versions, *what)
        assert self("python", "-m", "pip", "check") == "No broken requirements found."

    def refused(self, *arguments: str) -> str:
        """The one line that the command prints where it ends with exit code 1."""
        done = subprocess.run(
            [self.bin / "finespun", *arguments],
            cwd=self.cwd,
            env={**os.environ, **CLEAN},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        [line] = done.stderr.splitlines()
        return line

    def packages(self) -> dict[str, list[Requirement]]:
        """Every package in it, and what that may need."""
        told = json.loads(self("python", "-m", "pip", "inspect"))["installed"]
        return {
            canonicalize_name(one["metadata"]["name"]): [
                Requirement(text) for text in one["metadata"].get("requires_dist", [])
            ]
            for one in told
        }

    def files(self) -> list[str]:
        """The package's files with their checksums, as its installer noted them."""
        lines = (self.site / INFO / "RECORD").read_text().splitlines()
        return sorted(line for line in lines if line.startswith(("finespun/", f"{INFO}/METADATA")))


def needed(packages: dict[str, list[Requirement]], name: str, extras: set[str]) -> set[str]:
    """The names of a package and of all that it needs, with these extras of it."""
    found, todo = {name}, [(name, extra) for extra in ("", *extras)]
    for name, extra in todo:
        for one in packages[name]:
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                other = canonicalize_name(one.name)
                new = [(other, e) for e in ("", *one.extras) if (other, e) not in todo]
                found.add(other)
                todo += new
    return found


@pytest.fixture
def clean(tmp_path: Path) -> Iterator[Environment]:
    """An empty environment; it takes a gigabyte, so it does not stay."""
    yield Environment(tmp_path / "clean")
    shutil.rmtree(tmp_path / "clean")


@pytest.mark.slow
def test_wheel_and_sdist_work_in_a_clean_environment(
    built: tuple[Path, Path], clean: Environment
) -> None:
    """One environment, and one test, for all of it: the packages are large."""
    wheel, sdist = built
    own = {"pip", "setuptools"}
    clean.install(wheel)
    assert clean.packages().keys() | own == needed(clean.packages(), "finespun", set()) | own
    works(clean.bin / "python", clean.site, clean.cwd, **CLEAN)
    advice = "click is not installed; try: pip install 'finespun[cli]'"
    assert clean.refused("--help") == f"error: {advice}"

    clean.install(f"{wheel}[cli]")
    assert clean.packages().keys() | own == needed(clean.packages(), "finespun", {"cli"}) | own
    assert "Usage: finespun" in clean("finespun", "--help")
    assert "86,016 parameters" in clean("finespun", "explain", "lsr")
    listed = clean("finespun", "methods")
    assert all(f"{kind}  (" in listed for kind in finespun.STRUCTURES)
    shutil.copytree(ROOT / "examples", clean.cwd / "examples")
    assert "finespun[train]" in clean.refused("train", "examples/support.yaml")

    files = clean.files()
    clean.install("--force-reinstall", "--no-deps", sdist)
    assert clean.files() == files
    works(clean.bin / "python", clean.site, clean.cwd, **CLEAN)
    assert "Usage: finespun" in clean("finespun", "--help")


def test_the_advice_names_the_extra_that_brings_a_package() -> None:
    names = {"yaml": "pyyaml", "sklearn": "scikit-learn"}
    brought = {names.get(module, module): extra for module, extra in EXTRAS.items()}
    for extra in ("cli", "train", "bench"):
        declared = {Requirement(one).name for one in PROJECT["optional-dependencies"][extra]}
        assert declared - {"finespun"} == {p for p, e in brought.items() if e == extra}


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {finespun.__version__}\n" in cited
