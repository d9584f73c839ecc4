"""What a name in the state of a delta or a bank stands for."""

from typing import Literal

Role = Literal["parameter", "start", "gate", "mask", "dead", "buffer"]
START, GATE, MASK, DEAD = "start", "gate", "alive_", "alive"


def role_of(name: str) -> tuple[Role, str]:
    """The role of a tensor in a module's state, and its own name in that role: that of the
    parameter under a mask, that in the frozen copy of an exact start, "" for the gate and for the
    mark of an update that is dead as a whole."""
    inner = name.removeprefix(f"{START}.")
    if inner != name:
        return "start", inner
    if name == GATE:
        return "gate", ""
    if name == DEAD:
        return "dead", ""
    if name.startswith(MASK):
        return "mask", name.removeprefix(MASK)
    return "parameter", name


def name_of(role: Role, name: str) -> str:
    """The name in a module's state: what `role_of` takes apart."""
    if role == "start":
        return f"{START}.{name}"
    if role in ("gate", "dead"):
        return GATE if role == "gate" else DEAD
    return f"{MASK}{name}" if role == "mask" else name
