"""Draws docs/assets/lsr.svg from real arrays: python docs/assets/lsr.py [file.svg]"""

import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import finespun as fs
from finespun.contract import SiteShape
from finespun.kernels.kron import kron_rearrange, kron_sum

INK, GREY = "#1f2933", "#8a94a0"
TERMS, R1, R2, P1, P2 = 3, 2, 2, 6, 4


def grid(ax: Axes, M: Tensor, x: float, y: float, cell: float, top: float, blocks: int = 0) -> None:
    """M as coloured cells with its upper left corner at (x, y); heavy lines every `blocks`."""
    rows, columns = M.shape
    xs = [x + cell * i for i in range(columns + 1)]
    ys = [y - cell * i for i in range(rows + 1)]
    ax.pcolormesh(xs, ys, M, cmap="PuOr", vmin=-top, vmax=top, edgecolors="white", linewidth=0.6)
    for i in range(0, columns + 1, blocks or columns):
        ax.plot([xs[i]] * 2, [ys[0], ys[-1]], color=INK, linewidth=0.9)
    for i in (0, rows // 2, rows) if blocks else (0, rows):
        ax.plot([xs[0], xs[-1]], [ys[i]] * 2, color=INK, linewidth=0.9)


def word(ax: Axes, x: float, y: float, text: str, size: float = 11, **more: str) -> None:
    """Text with its middle at (x, y)."""
    style = {"color": INK, "ha": "center", "va": "center", **more}
    ax.text(x, y, text, fontsize=size, **style)


def draw(path: Path) -> None:
    """Three rows: the sum of Kronecker products, its rearrangement, and the counts."""
    g = torch.Generator().manual_seed(3)
    first = torch.randn(TERMS, R1, P1, generator=g)
    second = torch.randn(TERMS, R2, P2, generator=g)
    A = kron_sum(first, second)
    R = kron_rearrange(A, R1, R2, P1, P2)
    top, top_A = 2.2, float(A.abs().max())
    mpl.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "lsr", "font.family": "sans-serif"}
    )
    figure = Figure(figsize=(9.6, 5.9), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 96), ylim=(1, 60))
    ax.axis("off")

    left = {"ha": "left"}
    word(ax, 2, 57.2, "A is a sum of s Kronecker products of tiny matrices", 13, **left)
    word(ax, 2, 54.4, f"drawn: r = 4 = 2·2, in = 24 = 6·4, s = {TERMS}", 9.5, color=GREY, **left)
    grid(ax, A, 2, 50, 1.6, top_A, blocks=P2)
    word(ax, 21.2, 41.7, "A  (r × in)")
    word(ax, 44, 46.8, "=", 16)
    for k in range(TERMS):
        x = 47.5 + 16.5 * k
        grid(ax, first[k], x, 47.9, 1.0, top)
        word(ax, x + 7.4, 46.9, "⊗", 13)
        grid(ax, second[k], x + 8.8, 47.9, 1.0, top)
        word(ax, x + 3, 44.2, f"A1, term {k + 1}", 9)
        word(ax, x + 10.8, 44.2, "A2", 9)
        if k + 1 < TERMS:
            word(ax, x + 14.6, 46.9, "+", 14)

    word(ax, 2, 37.2, "the same values rearranged: one thin matrix product", 13, **left)
    grid(ax, R, 4.5, 34, 1.25, top_A)
    word(ax, 9.5, 16.8, "R(A)  (r1·p1 × r2·p2)")
    word(ax, 20, 26.5, "=", 16)
    grid(ax, first.flatten(1).T, 26, 34, 1.25, top)
    word(ax, 27.9, 16.8, "F1ᵀ  (r1·p1 × s)")
    word(ax, 34.5, 26.5, "·", 18)
    grid(ax, second.flatten(1), 38, 28.4, 1.25, top)
    word(ax, 43, 16.8, "F2  (s × r2·p2)")
    lines = (
        "each block of A becomes one row of R(A);",
        "no number changes, so norms stay;",
        "forming A is one product with inner size s;",
        "the best s-term fit of a given A is a truncated SVD.",
    )
    for i, line in enumerate(lines):
        word(ax, 56, 31 - 3.1 * i, line, 10.5, **left)

    counts(ax)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def counts(ax: Axes) -> None:
    """Bars of trained parameters."""
    left = {"ha": "left"}
    shape = SiteShape("layer", 768, 768)
    word(ax, 2, 11.6, "trained parameters of one 768 × 768 layer", 13, **left)
    bars = (
        ("LoRA, r = 8", fs.LoRA(rank=8).num_parameters(shape), "#c9ced6"),
        ("LoRA, r = 4", fs.LoRA(rank=4).num_parameters(shape), "#c9ced6"),
        ("LSR, r = 4, s = 16", fs.LSR(rank=4, separation_rank=16).num_parameters(shape), "#7b5aa6"),
    )
    for i, (name, count, colour) in enumerate(bars):
        y = 8.6 - 2.9 * i
        word(ax, 2, y, name, 10.5, **left)
        ax.barh(y, 56 * count / bars[0][1], left=20, height=1.9, color=colour)
        word(ax, 21 + 56 * count / bars[0][1], y, f"{count:,}", 10.5, **left)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
