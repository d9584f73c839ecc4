"""What reading an adapter's files gives: its state, and what is known about it."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from finespun.adapters.state import AdapterState
from finespun.storage.atomic import located


@dataclass(frozen=True)
class Saved:
    """An adapter read from files: its state, in no model yet, and what is known about it.

    `notes` are things that the user should know; `sha256` is that of the file of tensors;
    `repeated` are tensors of the base, by name, that lie in the file as well.
    """

    state: AdapterState
    sha256: str
    notes: tuple[str, ...] = ()
    repeated: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def named(self, name: str | None) -> "Saved":
        """The same adapter under another name; under its own where `name` is None."""
        if name is None:
            return self
        return dataclasses.replace(self, state=self.state.named(name))


def named_after(place: str | Path) -> str:
    """The name of an adapter whose file has none: that of its folder or file."""
    return re.sub(r"[.:/]", "-", located(place).name) or "default"
