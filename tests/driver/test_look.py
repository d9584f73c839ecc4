"""What is measured of the base before training: sketches, masks, peaks of memory, several ranks."""

import gc
import weakref

import pytest
import torch
import torch.multiprocessing as mp
from suite import draw
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from finespun.contract import Need
from finespun.driver import estimate_gradients, measure
from finespun.driver.activations import trained_tokens
from finespun.errors import InputError

WIDE = torch.float64
ALL = {Need.GRADIENTS, Need.COVARIANCE, Need.MEANS, Need.LOSS}


def net(depth=2, dtype=WIDE, width=24):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, dtype=dtype) for _ in range(depth)))


def rows(seed, count=6, dtype=WIDE):
    pair = draw(count, 24, seed=seed), draw(count, 24, seed=seed + 50)
    return tuple(t.to(dtype) for t in pair)


def loss(model, pair):
    return (model(pair[0]) - pair[1]).square().mean(), float(len(pair[0]))


@pytest.mark.parametrize("width", [6, 12, 24])
def test_a_sketch_is_the_gradient_as_far_as_its_width_reaches(width):
    batches = [rows(i, 3) for i in range(3)]
    whole = estimate_gradients(net(), ["0", "1"], batches, loss)
    found = measure(net(), ["0", "1"], ALL, batches, loss, sketch=width)
    for name, G in whole.items():
        assert found.found[Need.GRADIENTS][name].rank == width
        near = found.gradient(name)
        tail = float(torch.linalg.svdvals(G)[width:].norm())
        assert float((near - G).norm()) <= 4 * tail + 1e-9 * float(G.norm())
    x = torch.cat([pair[0] for pair in batches])
    torch.testing.assert_close(found.covariance("0"), x.mT @ x / len(x))
    with pytest.raises(InputError, match="sketch=0 must be at least 1"):
        measure(net(), ["0"], {Need.GRADIENTS}, batches, loss, sketch=0)


def test_padding_and_untrained_tokens_do_not_count():
    x = draw(2, 5, 24, seed=1, dtype=WIDE)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    labels = torch.where(mask, 3, -100)
    own = x[mask]
    for told in ({"attention_mask": mask.long()}, {"labels": labels}):
        batch = {"x": x, **told}
        found = measure(
            net(),
            ["0"],
            {Need.COVARIANCE, Need.MEANS},
            [batch],
            lambda m, b: m(b["x"]).sum(),
            masks=trained_tokens,
        )
        torch.testing.assert_close(found.covariance("0"), own.mT @ own / len(own))
        torch.testing.assert_close(found.mean("0"), own.mean(0))
    assert trained_tokens((x, x)) is None


class Held(TorchDispatchMode):
    """The most memories at once of tensors of a weight's shape, without those that are `known`."""

    def __init__(self, shape, known):
        super().__init__()
        self.shape, self.most = shape, 0
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.live = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.shape == self.shape:
                place = t.untyped_storage().data_ptr()
                if place not in self.known:
                    self.live[place] = self.live.get(place, 0) + 1
                    self.most = max(self.most, len(self.live))
                    weakref.finalize(t, self.let_go, place)
        return out

    def let_go(self, place):
        self.live[place] -= 1
        if not self.live[place]:
            del self.live[place]


@pytest.mark.parametrize("depth", [2, 12])
def test_one_layers_gradient_is_held_beside_the_sums(depth):
    model, batch = net(depth), rows(1)
    names = [str(i) for i in range(depth)]
    gc.collect()
    with Held((24, 24), model.parameters()) as held:
        estimate_gradients(model, names, [batch, batch], loss)
    assert depth < held.most <= depth + 2  # the sums, one gradient and what it is made by


def worker(rank, folder, wanted):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half = [rows(i, 4) for i in range(4)][rank::2]
    found = measure(net(), ["0", "1"], ALL, half, loss)
    for name in ("0", "1"):
        for what in ("gradient", "covariance", "mean"):
            torch.testing.assert_close(
                getattr(found, what)(name), wanted[f"{what} {name}"], rtol=1e-6, atol=1e-9
            )
    assert abs(found.loss() - float(wanted["loss"])) < 1e-6 * abs(float(wanted["loss"]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_halves_see_what_one_with_all_sees(tmp_path):
    found = measure(net(), ["0", "1"], ALL, [rows(i, 4) for i in range(4)], loss)
    wanted = {
        f"{what} {name}": getattr(found, what)(name)
        for name in ("0", "1")
        for what in ("gradient", "covariance", "mean")
    }
    wanted["loss"] = torch.tensor(found.loss(), dtype=WIDE)
    mp.spawn(worker, (tmp_path, wanted), nprocs=2)
