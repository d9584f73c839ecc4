"""What every test shares: one thread, a fixed seed, a registry that no test can change, tiers of
tests, their times, and real models that are converted once a checkout and loaded once a worker."""

import copy
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tiers import TIERS, left_out
from times import Record, Watch

from finespun.methods.structures import STRUCTURES

torch.set_num_threads(1)
settings.register_profile("finespun", deadline=None)  # time depends on what else runs
settings.load_profile("finespun")


def converted() -> str:
    """The folder of converted models, shared by all workers; another when converting changes."""
    root = Path(__file__).parents[1]
    code = [path.read_bytes() for path in sorted((root / "finespun/models").glob("*.py"))]
    made = hashlib.sha256(b"".join(code)).hexdigest()[:12]
    return str(root / ".pytest_cache/d/finespun" / f"models-{made}")


os.environ.setdefault("FINESPUN_CACHE", converted())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier", choices=TIERS, default="full", help="which tests: see tests/tiers.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Watch(), "watch")
    if not hasattr(config, "workerinput"):
        option = config.option
        chosen = option.keyword or option.markexpr or config.args != ["tests"]
        workers = config.getoption("numprocesses", 0) or 1
        config.pluginmanager.register(Record(config.option.tier, workers, not chosen), "record")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what belongs to the tier."""
    late = [i for i in items if left_out((m.name for m in i.iter_markers()), config.option.tier)]
    if late:
        config.hook.pytest_deselected(items=late)
        dropped = {id(item) for item in late}
        items[:] = [item for item in items if id(item) not in dropped]


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test draws the same numbers and leaves the registry of structures as it was."""
    torch.manual_seed(0)
    known = dict(STRUCTURES)
    yield
    STRUCTURES.clear()
    STRUCTURES.update(known)


def bits(model: torch.nn.Module) -> int:
    """A checksum of all parameters and buffers."""
    found = 0
    for tensor in model.state_dict().values():
        found = zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy(), found)
    return found


@pytest.fixture(scope="session")
def real_models() -> dict[str, tuple[Any, int]]:
    """Name -> a loaded model and its bits, as they were when it was loaded."""
    return {}


@pytest.fixture
def real_model(real_models: dict[str, tuple[Any, int]]) -> Iterator[Callable[..., Any]]:
    """`real_model(name)`: a text model by name, loaded once a worker and not to be changed, which
    is checked after the test; `real_model(name, own=True)` is a copy to change."""
    asked: set[str] = set()

    def give(name: str, own: bool = False) -> Any:
        from finespun.models import load_classifier

        if name not in real_models:
            loaded = load_classifier(name)
            real_models[name] = loaded, bits(loaded.model)
        asked.add(name)
        loaded, _ = real_models[name]
        return copy.deepcopy(loaded) if own else loaded

    yield give
    changed = [name for name in asked if bits(real_models[name][0].model) != real_models[name][1]]
    for name in changed:
        del real_models[name]
    assert not changed, "shared models were changed"
