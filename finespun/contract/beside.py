"""What stands beside, or in place of, a low-rank product in files of LoRAs."""

from dataclasses import dataclass

from torch import Tensor

from finespun.linalg import LowRank


@dataclass(frozen=True)
class Beside:
    """An update as PEFT's full form holds it: the `factors` c·B·A that the file has, None for an
    update that has none there; `magnitude` (out,), the lengths of DoRA's rows; or `rows`
    (tokens, width) of a table in place of its `own`, at the places `tokens`."""

    factors: LowRank | None = None
    magnitude: Tensor | None = None
    tokens: tuple[int, ...] = ()
    rows: Tensor | None = None
    own: Tensor | None = None
