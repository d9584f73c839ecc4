"""MoRA against its definition: M between fixed ways in and out."""

import pytest
import torch
from peers import moved, rank, site, update

from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.methods.structures import MoRA


def by_loop(delta, x, turns):
    """The update's product with one x (in,), block by block."""
    M, size = delta.M.detach(), len(delta.M)
    x = torch.cat([x, x[: -len(x) % size]])
    outputs = []
    for t, block in enumerate(x.split(size)):
        if turns:
            angle = torch.tensor([t * 10_000 ** (-2 * j / size) for j in range(size // 2)])
            pairs = torch.complex(block[: size // 2], block[size // 2 :])
            turned = pairs * torch.exp(1j * angle.double())
            block = torch.cat([turned.real, turned.imag])
        outputs.append(block)
    y = torch.cat([M @ b for b in outputs]) if turns else M @ sum(outputs)
    out = delta.site.shape.out_features
    return torch.stack([y[o % len(y)] for o in range(out)]) * delta.scale


@pytest.mark.parametrize("sharing", ["rotation", "sum"])
@pytest.mark.parametrize("shape", [(24, 24), (50, 24), (24, 50), (24, 33)])
def test_the_update_is_its_definition(sharing, shape):
    (delta,) = moved(MoRA(rank=2, sharing=sharing), site(*shape))
    x = torch.randn(4, shape[1]).double()
    wanted = torch.stack([by_loop(delta, row, sharing == "rotation") for row in x])
    torch.testing.assert_close(delta(x), wanted)
    torch.testing.assert_close(x @ update(delta).T, wanted)


def test_the_rank_is_far_above_lora_s():
    where = site(48, 48)
    (turned,), (summed,) = (moved(MoRA(rank=2, sharing=s), where) for s in ("rotation", "sum"))
    assert len(turned.M) == len(summed.M) == 14
    assert rank(summed) == 14
    assert rank(turned) >= 42


@pytest.mark.parametrize("sharing", ["rotation", "sum"])
def test_twice_the_input_gives_twice_the_output(sharing):
    (delta,) = moved(MoRA(rank=2, sharing=sharing), site(24, 20))
    x = torch.randn(3, 20).double()
    torch.testing.assert_close(delta(2 * x), 2 * delta(x))


def test_counts():
    shape = SiteShape("s", 768, 768)
    assert MoRA(rank=8, sharing="sum").num_parameters(shape) == 12_321
    assert MoRA(rank=8).num_parameters(shape) == 110**2
    assert MoRA(rank=8, sharing="sum").flops(shape) == 768 + 2 * 12_321
    assert MoRA(rank=8).flops(shape) == 7 * (3 * 110 + 2 * 12_100)


def test_what_cannot_be_is_named():
    with pytest.raises(PlanError, match=r"rank=16.*matrix of 22.*'site' \(12x18\).*rank=4"):
        MoRA(rank=16).plan([site(12, 18)])
    MoRA(rank=4).plan([site(12, 18)])
    with pytest.raises(InputError, match=r"'rope'.*'rotation'"):
        MoRA(sharing="rope")
