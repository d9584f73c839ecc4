"""Block-LoRA: what its layouts are, next to LoRA."""

import pytest
import torch
from peers import built, largest_tensor, moved, rank, site, update
from torch import nn

import finespun as fs
from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.methods.structures import BlockLoRA


@pytest.mark.parametrize(
    ("form", "small", "operations"),
    [
        (BlockLoRA(rank=8, blocks=4, layout="literal"), 7_680, 6_144),
        (BlockLoRA(rank=8, blocks=4), 3_072, 6_144),
        (BlockLoRA(rank=2, blocks=2, layout="literal"), 2_304, 3_072),
        (BlockLoRA(rank=8, blocks=4, layout="input"), 7_680, 15_936),
    ],
)
def test_counts(form, small, operations):
    shape = SiteShape("s", 768, 768)
    assert form.num_parameters(shape) == small
    assert form.flops(shape, 1) - form.flops(shape, 0) == operations
    if form.layout == "literal" and form.rank == 8:
        assert form.num_parameters(SiteShape("s", 4096, 4096)) == 40_960


def test_numbers_of_clip():
    """q, k and v of 12 layers of width 768 and 12 of width 512."""
    widths = [SiteShape("s", d, d) for d in (768, 512)]

    def total(**options):
        return 36 * sum(BlockLoRA(rank=2, **options).num_parameters(s) for s in widths)

    assert total(blocks=1) == 184_320
    assert total(blocks=2, layout="literal") == 138_240
    assert total(blocks=2) == 92_160


def trained(form, eps):
    torch.manual_seed(0)
    (delta,), _, _ = built(form, site(64, 64))
    delta.double()
    target = torch.randn(64, 64).double()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2, eps=eps)
    for _ in range(100):
        x = torch.randn(16, 64).double()
        optimizer.zero_grad()
        (delta(x) - x @ target.T).square().mean().backward()
        optimizer.step()
    return delta


def test_literal_blocks_stay_equal_and_are_the_folded_one():
    literal = trained(BlockLoRA(rank=8, blocks=4, layout="literal"), 1e-14)
    folded = trained(BlockLoRA(rank=8, blocks=4), 1e-14)
    assert all(torch.equal(B, literal.B[0]) for B in literal.B)
    torch.testing.assert_close(update(folded), update(literal), rtol=1e-9, atol=1e-10)
    assert float((literal.B[0] - folded.B).detach().abs().max()) < 1e-10
    assert rank(literal) == 2


def test_the_input_layout_adds_the_pieces_of_x():
    (delta,) = moved(BlockLoRA(rank=6, blocks=3, layout="input"), site(20, 12))
    W, x = update(delta), torch.randn(2, 5, 12).double()
    assert torch.equal(W[:, :4], W[:, 4:8])
    assert torch.equal(W[:, :4], W[:, 8:])
    torch.testing.assert_close(delta(x), x @ W.T, rtol=1e-12, atol=1e-12)
    assert rank(delta) == 4


def test_the_scale_is_that_of_the_code():
    assert BlockLoRA(rank=2).scale == pytest.approx(0.7071, abs=1e-4)
    assert BlockLoRA(rank=4, alpha=8.0).scale == 4.0


def test_what_does_not_divide_is_named():
    with pytest.raises(InputError, match=r"blocks=3.*rank=8.*4"):
        BlockLoRA(rank=8, blocks=3)
    with pytest.raises(PlanError, match=r"blocks=5.*in=12.*6"):
        BlockLoRA(rank=4, blocks=5, layout="input").plan([site(20, 12)])


@pytest.mark.parametrize("layout", ["folded", "input"])
def test_nothing_of_the_weight_s_size_is_made(layout):
    (delta,), _, _ = built(BlockLoRA(rank=4, blocks=2, layout=layout), site(96, 96))
    x = torch.randn(5, 96)
    assert largest_tensor(lambda: delta(x).square().sum().backward()) < 96 * 96
    assert largest_tensor(lambda: delta.dense(delta.base_weight())) >= 96 * 96


class Towers(nn.Module):
    """Two towers of two layers: pictures on one side, one text for each of ten classes."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 24))
        self.told = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 24))

    def forward(self, pictures, texts):
        seen, told = (
            nn.functional.normalize(t, dim=-1) for t in (self.seen(pictures), self.told(texts))
        )
        return 10 * seen @ told.T


def test_sixteen_shots_beat_none():
    torch.manual_seed(0)
    model, texts, centres = Towers(), torch.randn(10, 32), torch.randn(10, 32)
    labels = torch.arange(10).repeat_interleave(16)
    shots, unseen = (centres[labels] + 0.7 * torch.randn(160, 32) for _ in range(2))

    def accuracy():
        return float((model(unseen, texts).argmax(1) == labels).float().mean())

    before = accuracy()
    targets = ["seen.0", "seen.2", "told.0", "told.2"]
    adapter = fs.adapt(model, BlockLoRA(rank=4, blocks=2, alpha=8.0), targets, train_modules=())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
    losses = []
    for _ in range(200):
        loss = nn.functional.cross_entropy(model(shots, texts), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    windows = torch.tensor(losses).view(10, 20).mean(1)
    assert (windows.diff() < 0).all()
    assert accuracy() >= before + 0.10
