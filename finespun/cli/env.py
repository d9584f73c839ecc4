"""`finespun env`: versions and hardware, for a bug report."""

import json
import platform
import sys
from importlib import metadata
from typing import Annotated

import typer

from finespun.cli.screen import echo

EXAMPLE = "finespun env"
PACKAGES = ("torch", "safetensors", "numpy", "transformers", "polars", "pydantic", "typer", "rich")


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print versions of Finespun and of what it stands on, threads and devices."""
    found = gather()
    if as_json:
        echo(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        echo(f"{name:<{width}}  {value}")


def gather() -> dict[str, str]:
    """Name -> version or description; "not installed" where a package is missing."""
    import torch

    import finespun

    found = {"finespun": finespun.__version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["platform"] = platform.platform()
    found["threads"] = str(torch.get_num_threads())
    found["devices"] = ", ".join(["cpu", *gpus])
    return found
