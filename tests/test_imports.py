"""`import finespun` stays light: torch, numpy, safetensors and little more."""

import json
import subprocess
import sys

HEAVY = ("transformers", "peft", "pydantic", "yaml", "typer", "rich", "scipy", "sklearn", "polars")


def modules_after(statement):
    """Names of all modules that a fresh interpreter holds after the statement."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


def test_the_core_loads_few_modules_and_none_of_the_extras():
    added = modules_after("import finespun") - modules_after("import torch")
    assert len(added) <= 100, sorted(added)
    assert not [name for name in added if name.split(".")[0] in HEAVY]
