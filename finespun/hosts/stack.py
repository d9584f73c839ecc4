"""The `rows` and `disabled` blocks that a model is inside of: a stack.

A block that is left before one inside it ends when that one does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Kind = Literal["rows", "disabled"]


class Block:
    """One `rows` or `disabled` block that the model is inside of, and how it is ended. `names` are
    adapters that serve in it or after it: they must stay. `aside` are weights that its end puts
    back."""

    def __init__(
        self,
        kind: Kind,
        end: Callable[[], None],
        names: frozenset[str] = frozenset(),
        aside: tuple[dict[str, Any], ...] = (),
    ) -> None:
        self.kind, self.end, self.names, self.aside, self.left = kind, end, names, aside, False


class Blocks(list[Block]):
    """The blocks, innermost last. Copies and pickles of a model are inside of none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Blocks":
        return Blocks()

    def __reduce__(self) -> tuple[type["Blocks"], tuple[()]]:
        return Blocks, ()


@contextmanager
def inside(
    blocks: Blocks,
    kind: Kind,
    end: Callable[[], None],
    names: frozenset[str] = frozenset(),
    aside: tuple[dict[str, Any], ...] = (),
) -> Iterator[None]:
    """A block of the stack; `end` puts back what stood before it, once those inside are left."""
    block = Block(kind, end, names, aside)
    blocks.append(block)
    try:
        yield
    finally:
        block.left = True
        while blocks and blocks[-1].left:
            blocks.pop().end()
