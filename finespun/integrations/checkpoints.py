"""What a checkpoint of a foreign trainer holds of an adapter: its files, readable by `fs.load`, and
beside them the exact state of the run: every tensor as it was, and the driver."""

from pathlib import Path

from finespun.adapter import Adapter
from finespun.adapters.keys import parsed, spelt
from finespun.driver import Driver
from finespun.errors import FileError
from finespun.training.checkpoint import load_checkpoint, save_checkpoint

STATE = "finespun"


def write(folder: str | Path, adapter: Adapter, driver: Driver | None) -> None:
    """Put the adapter's files and the state of the run into a folder, each whole or not at all."""
    adapter.save(folder)
    write_state(folder, adapter, driver)


def write_state(folder: str | Path, adapter: Adapter, driver: Driver | None) -> None:
    """Put the state of the run into a folder."""
    state = {
        "step": 0 if driver is None else driver.step,
        "adapter": spelt(adapter.attached.tensors()),
        "driver": None if driver is None else driver.state_dict(),
    }
    save_checkpoint(Path(folder) / STATE, state, keep=1)


def read(folder: str | Path, adapter: Adapter) -> None:
    """Copy a checkpoint's adapter into the one that is attached, bit for bit. Raises FileError
    where the folder holds none, InputError where it is of another form."""
    place = Path(folder)
    if (place / STATE).is_dir():
        live = adapter.attached
        live.load(parsed(load_checkpoint(place / STATE)["adapter"], live.trained))
    elif (place / "adapter.json").is_file():
        adapter.swap(place)
    else:
        raise FileError(
            f"{place} holds no adapter.json: it was not written by a trainer of "
            "fs.integrations.trainer_class; load what it holds yourself, and train from there"
        )


def read_driver(folder: str | Path, driver: Driver) -> None:
    """Let a driver stand where the checkpoint's stood; without one it begins anew."""
    place = Path(folder) / STATE
    state = load_checkpoint(place)["driver"] if place.is_dir() else None
    if state is not None:
        driver.load_state_dict(state)
