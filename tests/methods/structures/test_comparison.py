"""Every structure's count, rank, cost and exits, side by side."""

from dataclasses import dataclass

import pytest
import torch
from peers import moved, rank, site, update

import finespun as fs
from finespun.contract import SiteShape, Structure, TensorSite
from finespun.methods.structures import (
    BOFT,
    LSR,
    NOLA,
    S2FT,
    BlockLoRA,
    DoRA,
    FourierFT,
    GraLoRA,
    KAdaptation,
    KronA,
    LoHa,
    LoKr,
    LoR2C,
    LoRAXS,
    S2LoRA,
    TeRA,
    TiedLoRA,
    UniLoRA,
    VBLoRA,
    VeRA,
)

SIDES = (768, 4096)
WIDTH = 96


@dataclass(frozen=True)
class Row:
    """One structure at a published setting, on 768² and 4096².

    `numbers` at one site and `shared` by the model; `token` and `step` are operations for each row
    of x and once for each step; `small` is the setting scaled to 96², whose update has rank `rank`;
    `exact` says that a LoRA can hold it. Two figures are below the published ones, because the
    cheaper order of products is taken: TeRA 204,800 (208,896) and LSR as (1, 4), which
    test_structures.py has.
    """

    form: Structure
    numbers: tuple[int, int]
    token: tuple[int, int]
    small: Structure
    rank: int
    shared: tuple[int, int] = (0, 0)
    step: tuple[float, float] = (0, 0)
    exact: bool = True

    def __str__(self) -> str:
        return f"{self.form.kind}-{self.rank}"


SPLIT = {"rank": 64, "separation_rank": 4, "rank_split": (8, 8)}
ROWS = (
    Row(fs.LoRA(rank=8), (12_288, 65_536), (24_576, 131_072), fs.LoRA(rank=8), 8),
    Row(
        DoRA(rank=8), (13_056, 69_632), (26_880, 143_360), DoRA(rank=8), 96,
        step=(18 * 768**2, 18 * 4096**2), exact=False,
    ),
    Row(VeRA(rank=256), (1_024, 4_352), (787_456, 4_198_656), VeRA(rank=32), 32),
    Row(
        TiedLoRA(rank=8), (776, 4_104), (25_352, 135_176), TiedLoRA(rank=8), 8,
        shared=(12_288, 65_536),
    ),
    Row(
        VBLoRA(rank=4), (6_144, 32_768), (12_288, 65_536),
        VBLoRA(rank=4, num_vectors=32, vector_length=32), 4,
        shared=(65_536, 65_536), step=(24_576, 131_072),
    ),
    Row(LoRAXS(rank=16), (256, 256), (49_664, 262_656), LoRAXS(rank=16), 16),
    Row(KronA(), (1_600, 8_192), (86_016, 1_048_576), KronA(), 96),
    Row(LoKr(rank=8), (1_088, 5_120), (33_792, 196_608), LoKr(rank=2), 16),
    Row(
        KAdaptation(), (1_536, 8_192), (12_416, 65_664), KAdaptation(), 16, shared=(64, 64),
    ),
    Row(
        LoHa(rank=8), (24_576, 131_072), (196_608, 1_048_576), LoHa(rank=4), 16,
        step=(64 * 2 * 768, 64 * 2 * 4096),
    ),
    Row(
        FourierFT(frequencies=1000), (1_000, 1_000), (1_179_648, 33_554_432),
        FourierFT(frequencies=3), 6, exact=False,
        step=(2.5 * 768**2 * 19.17, 2.5 * 4096**2 * 24),
    ),
    Row(
        BOFT(block_size=4), (3_840, 20_480), (6_144 + 3 * 768, 32_768 + 3 * 4096),
        BOFT(block_size=4), 96, exact=False, step=(192 * 4**3 * 8 / 3, 1024 * 4**3 * 8 / 3),
    ),
    Row(
        LSR(path="formed"), (3_584, 8_192), (12_288, 65_536), LSR(path="formed"), 4,
        step=(196_608, 1_048_576),
    ),
    Row(
        LSR(path="factorised", rank_split=(2, 2)), (3_584, 8_192), (104_448, 540_672),
        LSR(path="factorised", rank_split=(2, 2)), 4,
    ),
    Row(
        LSR(path="formed", **SPLIT), (3_584, 8_192), (196_608, 1_048_576),
        LSR(rank=16, separation_rank=4, rank_split=(4, 4)), 16, step=(786_432, 4_194_304),
    ),
    Row(
        LSR(path="factorised", **SPLIT), (3_584, 8_192), (122_880, 589_824),
        LSR(rank=64, separation_rank=4, rank_split=(8, 8)), 64,
    ),
    Row(
        NOLA(rank=8, k=1000), (2_000, 2_000), (24_576, 131_072), NOLA(rank=8, k=50), 8,
        step=(24.6e6, 131e6),
    ),
    Row(
        UniLoRA(rank=4, size=4_608), (0, 0), (12_288, 65_536), UniLoRA(rank=4, size=100), 4,
        shared=(4_608, 4_608), step=(6_144, 32_768),
    ),
    Row(TeRA(rank=16), (64, 64), (204_800, 458_752), TeRA(rank=4), 16),
    Row(
        BlockLoRA(rank=8, blocks=4, layout="literal"), (7_680, 40_960), (6_144, 32_768),
        BlockLoRA(rank=8, blocks=4, layout="literal"), 2, step=(3 * 768 * 2, 3 * 4096 * 2),
    ),
    Row(
        S2LoRA(rank=32), (32, 32), (98_304, 524_288), S2LoRA(rank=32), 32,
        shared=(49_152, 262_144),
    ),
    Row(
        S2FT(channels=1 / 64), (9_216, 262_144), (18_432, 524_288), S2FT(channels=1 / 12), 8,
    ),
    Row(GraLoRA(rank=32, k=2), (49_152, 262_144), (98_304, 524_288), GraLoRA(rank=8, k=2), 16),
    Row(LoR2C(rank=8), (12_288, 65_536), (24_576, 131_072), LoR2C(rank=8), 8, exact=False),
)  # fmt: skip
each = pytest.mark.parametrize("row", ROWS, ids=str)


@each
def test_counts(row):
    for side, numbers, shared in zip(SIDES, row.numbers, row.shared):
        place = TensorSite("s", torch.zeros(side, side, device="meta"), kind=row.form.site_kind)
        assert row.form.num_parameters(place.shape) == numbers
        assert row.form.num_shared_parameters(row.form.plan([place])) == shared


@each
def test_operations(row):
    for side, token, step in zip(SIDES, row.token, row.step):
        shape = SiteShape("s", side, side, row.form.site_kind)
        once = row.form.flops(shape, 0)
        assert row.form.flops(shape, 1) - once == pytest.approx(token, rel=0.01)
        assert once == pytest.approx(step, rel=0.01, abs=0)


def small(row):
    """The scaled setting's delta, every parameter moved."""
    plain = site(WIDTH, WIDTH)
    place = TensorSite("site", plain.value, kind=row.form.site_kind)
    return moved(row.small, place)[0]


@each
def test_rank(row):
    assert rank(small(row)) == row.rank


@each
def test_what_a_lora_can_hold(row):
    delta = small(row)
    if not row.exact:
        assert delta.factors() is None or not delta.mergeable
        return
    held = delta.as_low_rank()
    x = torch.eye(WIDTH, dtype=torch.float64)
    error = (held.dense() - delta(x).detach().T).norm() / update(delta).norm()
    assert error <= 1e-12
    assert held.rank == row.rank or held.rank >= row.rank == WIDTH


def test_a_sparse_s_has_the_rank_of_its_support():
    (delta,) = moved(S2LoRA(rank=32), site(WIDTH, WIDTH))
    delta.s.data[7:] = 0
    assert rank(delta) == 7


def test_numbers_of_whole_models():
    """Uni-LoRA's vector is the model's; RoBERTa-base and LLaMA-2 7B, query and value."""
    for side, blocks, size, whole in ((768, 24, 23_040, 147_456), (4096, 64, 524_288, 2_097_152)):
        sites = [TensorSite(f"s{i}", torch.zeros(side, side, device="meta")) for i in range(blocks)]
        form = UniLoRA(rank=4, size=size)
        assert form.total_parameters(form.plan(sites)) == size
        assert sum(fs.LoRA(rank=4).num_parameters(s.shape) for s in sites) == whole
