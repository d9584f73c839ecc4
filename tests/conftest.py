"""What every test shares: one thread, a fixed seed, a registry that no test can change, tiers of
tests and their times."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from tiers import TIERS, left_out
from times import Record, Watch

from finespun.methods.structures import STRUCTURES

torch.set_num_threads(1)
settings.register_profile("finespun", deadline=None)  # time depends on what else runs
settings.load_profile("finespun")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier", choices=TIERS, default="full", help="which tests: see tests/tiers.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Watch(), "watch")
    if not hasattr(config, "workerinput"):
        whole = (
            not config.option.keyword and not config.option.markexpr and config.args == ["tests"]
        )
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
