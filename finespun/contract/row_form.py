"""An adapted layer as gains and a low-rank product around its base, row by row of a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finespun.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RowForm:
    """y = g_out ∘ (W0 (g_in ∘ x) + b0) + B (A x) + db;  None for what is not there.

    g_out (out,), g_in (in,), A (r, in), B (out, r) with the scale in it, db (out,). Around a block,
    W0 x + b0 is the block's output. The strength of an adapter is the caller's: see `at`.
    Raises InputError where A comes without B or B without A.
    """

    g_out: Tensor | None = None
    g_in: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    db: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.A is None) != (self.B is None):
            told, other = ("B", "A") if self.A is None else ("A", "B")
            raise InputError(f"a row form has {told} and no {other}; give both or neither")

    def through(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """y (..., out) for x (..., in), in the dtype of `base`, which computes W0 x + b0."""
        plain = base(x if self.g_in is None else (self.g_in * x).to(x.dtype))
        y = plain if self.g_out is None else self.g_out * plain
        if self.A is not None and self.B is not None:
            y = y + F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)
        return (y if self.db is None else y + self.db).to(plain.dtype)

    def at(self, strength: float) -> "RowForm":
        """The form of W0 + strength · ΔW and b0 + strength · Δb. Raises InputError for gains on
        both sides, whose update is no multiple of itself at strengths other than 1."""
        if self.g_out is not None and self.g_in is not None and strength != 1:
            raise InputError(
                f"gains on both sides cannot be taken at strength {strength}; 1 is exact"
            )
        gains = [None if g is None else 1 + strength * (g - 1) for g in (self.g_out, self.g_in)]
        up, db = (None if t is None else strength * t for t in (self.B, self.db))
        return RowForm(g_out=gains[0], g_in=gains[1], A=self.A, B=up, db=db)

    def less(self, start: "RowForm") -> "RowForm":
        """The form whose update is this one's without `start`'s, a constant; for gains on the
        outputs alone or on the inputs alone."""
        outer, inner = ((self.g_out, start.g_out), (self.g_in, start.g_in))
        A, B, db = self.A, self.B, self.db
        if A is not None and B is not None and start.A is not None and start.B is not None:
            A = torch.cat([A, start.A.detach()])
            B = torch.cat([B, -start.B.detach()], dim=1)
        if db is not None and start.db is not None:
            db = db - start.db.detach()
        return RowForm(g_out=_moved(*outer), g_in=_moved(*inner), A=A, B=B, db=db)


def _moved(gain: Tensor | None, start: Tensor | None) -> Tensor | None:
    """1 + g − g0: a gain that equals one at the start."""
    return gain if gain is None or start is None else 1 + (gain - start.detach())
