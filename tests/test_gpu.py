"""tests/gpu.py without a GPU: it refuses, lists what is unverified, and its tests are there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch

ROOT = Path(__file__).parent.parent


def test_without_a_gpu_it_refuses_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "verify", lambda *arguments: pytest.fail("ran all the same"))
    assert gpu.main([]) == gpu.NO_DEVICE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: torch finds no CUDA GPU here: nothing was verified\n"


def test_every_claim_is_listed_as_unverified_there_and_in_the_limits(capsys):
    assert gpu.main(["--list"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [f"unverified  {claim.text}" for claim in gpu.CLAIMS]
    page = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    listed = re.sub(r"\s+", " ", page.partition("## Unverified on a GPU")[2].partition("\n## ")[0])
    assert re.findall(r"(?<= )- (.+?)[;.](?= |$)", listed) == [c.text for c in gpu.CLAIMS]
    assert gpu.main(["--list", "--only", "no such words"]) == gpu.FAILED


@pytest.mark.parametrize("name", sorted({test for claim in gpu.CLAIMS for test in claim.tests}))
def test_the_tests_of_every_claim_exist_and_look_at_the_device(name):
    file, _, function = name.partition("::")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    functions = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert not function or function in functions
    assert "from suite import" in text or "from benchmarks" in text


@pytest.mark.slow
def test_a_claim_is_verified_by_its_tests_and_a_false_one_is_not(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "verify", lambda claim, device: (claim is gpu.CLAIMS[0], device))
    assert gpu.main(["--device", "cpu"]) == gpu.FAILED
    told = capsys.readouterr().out.splitlines()
    assert told[1:-1] == [f"{claim.text}: cpu" for claim in gpu.CLAIMS]
    assert told[-1] == f"1 of {len(gpu.CLAIMS)} claims verified on the CPU"
    monkeypatch.undo()
    stands, told = gpu.verify(gpu.Claim("false", ("no_such_file.py",)), "cpu")
    assert not stands
    assert "no_such_file.py" in told


@pytest.mark.slow
def test_it_runs_as_a_program_on_the_cpu():
    script = [sys.executable, "tests/gpu.py", "--device", "cpu", "--only", "frozen random"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1 of 1 claims verified on the CPU"
