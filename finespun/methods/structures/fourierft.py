"""FourierFT: a few trained entries of the update's spectrum (arXiv 2405.03003)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finespun.contract.delta import Bank, Delta
from finespun.contract.site import Site, SiteShape
from finespun.contract.structure import (
    UNCHOSEN,
    Choice,
    Plan,
    Structure,
    register,
)
from finespun.errors import InputError, PlanError
from finespun.linalg import streams


@register
@dataclass(frozen=True, kw_only=True)
class FourierFT(Structure):
    """ΔW = α·Re IFFT2(F), F (out, in) zero but for n trained real entries c (n,) at places drawn
    once, the same for all sites of one shape;  n parameters, rank up to min(2n, full).

    Good for: a count of parameters that does not grow with the layer.
    Not for: large layers, as ΔW is formed whole in each step; LoRA servers.

    c starts at zero. (The paper draws it; since ΔW is linear in c, that start with its own update
    taken away is this one.) α is `scaling`; the update shrinks as α/√(in·out), so large values are
    usual. `draw` says who draws the places: "stream", the same on every machine, or "torch", whose
    generator PEFT uses. Source: arXiv 2405.03003.
    """

    frequencies: int = 1000
    scaling: float = 150.0
    seed: int = 777
    draw: Literal["stream", "torch"] = "stream"

    kind = "fourierft"
    sizes = ("frequencies",)
    default_lr = 0.1
    source = "arXiv 2405.03003"
    aliases = {"n_frequency": "frequencies", "random_loc_seed": "seed"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frequencies < 1:
            raise InputError(f"frequencies={self.frequencies} must be at least 1; try 1000")
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise InputError(f"scaling={self.scaling} must be positive; try 150.0")
        if self.draw not in ("stream", "torch"):
            raise InputError(f"draw={self.draw!r} is not known; try 'stream' or 'torch'")

    def choose(self, site: Site) -> dict[str, Any]:
        shape = site.shape
        most = shape.out_features * shape.in_features
        if self.frequencies > most:
            raise PlanError(
                f"frequencies={self.frequencies} exceeds what {shape.name!r} "
                f"({shape.out_features}x{shape.in_features}) can hold; at most {most}"
            )
        return {"frequencies": self.frequencies}

    def build(self, site: Site, plan: Plan, bank: Bank | None = None) -> "FourierFTDelta":
        n = plan.choices[site.shape.name]["frequencies"]
        out, inner = site.shape.out_features, site.shape.in_features
        if self.draw == "torch":
            torch_draw = torch.Generator().manual_seed(self.seed)
            places = torch.randperm(out * inner, generator=torch_draw)[:n]
        else:
            key = streams.key(self.seed, f"{out}x{inner}", "frequencies")
            places = streams.choice(key, out * inner, n)
        return FourierFTDelta(site, places, self.scaling)

    def num_parameters(self, shape: SiteShape, choice: Choice = UNCHOSEN) -> int:
        return int(choice.get("frequencies", self.frequencies))

    def flops(self, shape: SiteShape, tokens: int = 1, choice: Choice = UNCHOSEN) -> int:
        """A real inverse FFT of the whole update once, then a dense product."""
        size = shape.out_features * shape.in_features
        return 2 * tokens * size + math.ceil(2.5 * size * math.log2(max(size, 2)))


class FourierFTDelta(Delta):
    """c (n,); `train` says which entries of F they are."""

    reads_base = False

    def __init__(self, site: Site, places: Tensor, scaling: float) -> None:
        super().__init__(site)
        self.scaling = scaling
        self.c = nn.Parameter(torch.zeros(len(places), device=site.device))
        self.train_at(places)

    def train_at(self, places: Tensor) -> None:
        """Let c be the entries `places` (n,) of F, counted row by row.

        Re IFFT2(F) is the real IFFT2 of F's Hermitian part: c/2 at (p, q) and at (−p, −q), of which
        the columns up to in/2 are kept.
        """
        out, inner = self.site.shape.out_features, self.site.shape.in_features
        p, q = places // inner, places % inner
        rows, columns = torch.cat([p, -p % out]), torch.cat([q, -q % inner])
        kept = columns <= inner // 2
        entry = torch.arange(len(places), device=places.device).repeat(2)
        self.hold("entry", entry[kept])
        self.hold("place", (rows * (inner // 2 + 1) + columns)[kept])

    def delta(self, w0: Tensor) -> Tensor:
        out, inner = w0.shape
        flat = torch.zeros(out * (inner // 2 + 1), dtype=self.c.dtype, device=self.c.device)
        values = self.c[self.held("entry", self.c)] * (self.scaling / 2)
        half = flat.index_add(0, self.held("place", self.c), values).view(out, -1)
        change: Tensor = torch.fft.irfft2(half, s=(out, inner))
        return change
