"""Adapters on the Hugging Face Hub, fetched into its cache: JSON and safetensors, nothing else."""

import os
import re
from pathlib import Path
from typing import Any

from finespun.errors import FileError, InputError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ("*.json", "*.safetensors")  # never a pickle


def is_repository(name: str | Path) -> bool:
    """Whether this is "owner/name" rather than a path: no folder or file lies there, nor would one
    be made in a folder that is there."""
    if not isinstance(name, str) or not REPOSITORY.fullmatch(name):
        return False
    return not Path(name).exists() and not Path(name).parent.is_dir()


def download(name: str, revision: str | None, subfolder: str | None, token: str | None) -> Path:
    """The folder of the cache that holds the adapter `name`; HF_ENDPOINT, HF_HUB_CACHE and
    HF_HUB_OFFLINE act as everywhere. Raises FileError where there is no such repository, revision
    or adapter, or where neither the network nor the cache has it."""
    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise InputError(f"subfolder={subfolder!r} must lie inside the repository")
    prefix = "" if subfolder is None else f"{subfolder.strip('/')}/"
    try:
        from huggingface_hub import errors, snapshot_download
    except ModuleNotFoundError as error:
        raise FileError(
            f"{name!r} is no folder; to fetch it from the Hub: pip install huggingface_hub"
        ) from error
    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": [prefix + pattern for pattern in WANTED],
        "token": token,
        "endpoint": os.environ.get("HF_ENDPOINT"),
        "cache_dir": os.environ.get("HF_HUB_CACHE"),
        "local_files_only": os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes"),
    }
    at = f"{name!r}" + ("" if revision is None else f" at revision {revision!r}")
    try:
        folder = Path(snapshot_download(name, **options))
    except errors.RevisionNotFoundError as error:
        raise FileError(f"{name!r} has no revision {revision or 'main'!r} on the Hub") from error
    except errors.GatedRepoError as error:
        raise FileError(
            f"{name!r} is gated: ask for access on its page, then pass token="
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileError(
            f"{name!r} is no folder here and no public repository of the Hub; a private one needs "
            "token=, or `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FileError(f"{at} is not in the cache, and the Hub cannot be reached") from error
    except errors.HfHubHTTPError as error:
        raise FileError(f"the Hub refuses {at}: {error}") from error
    except OSError as error:
        raise FileError(f"{at} is not in the cache, and the Hub cannot be reached") from error
    place = folder / prefix
    if not place.is_dir() or not any(
        p.suffix in (".json", ".safetensors") for p in place.iterdir()
    ):
        raise FileError(
            f"{at} has no JSON and no safetensors in {subfolder or 'its top folder'!r}; "
            "pickled files (.bin, .pt) are not read"
        )
    return place
