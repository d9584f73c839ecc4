"""NOLA: regeneration, counts, the start, and the faults of the released code."""

import pytest
import torch
from peers import built, fingerprint, fit, moved, rank, site, size_of_file, update
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import finespun as fs
from finespun.contract import SiteShape
from finespun.errors import PlanError
from finespun.methods.structures import NOLA


@pytest.mark.parametrize(
    ("size", "token", "step"), [(768, 24_576, 24_576_000), (4096, 131_072, 131_072_000)]
)
def test_counts_of_the_comparison_table(size, token, step):
    form, shape = NOLA(k=1000), SiteShape("s", size, size)
    assert form.num_parameters(shape) == 2_000
    assert form.flops(shape, 1) - form.flops(shape, 0) == token
    assert form.flops(shape, 0) == step


def test_numbers_of_published_models():
    any_shape = SiteShape("s", 1024, 1024)
    assert 48 * NOLA(k=1000).num_parameters(any_shape) == 96_000
    blocks = {512: 80, 256: 40, 128: 32}
    counts = [7 * n * NOLA(k=k).num_parameters(any_shape) for k, n in blocks.items()]
    assert counts == [573_440, 143_360, 57_344]


def basis_of(delta, side, width):
    kept = delta.bases[side].kept.on()
    return kept.view(len(kept), -1, width) / len(kept) ** 0.5


def test_factors_are_weighted_sums_of_the_basis():
    (delta,) = moved(NOLA(rank=3, k=12, l=9), site(20, 16))
    A, B = delta.low_rank()
    mixed = torch.einsum("i,irn->rn", delta.alpha, basis_of(delta, 0, 16).double())
    torch.testing.assert_close(A, mixed + delta.A0.on().double() / 4)
    torch.testing.assert_close(
        B, torch.einsum("j,jor->or", delta.beta, basis_of(delta, 1, 3).double())
    )
    assert rank(delta) == 3


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_regenerated_chunks_are_the_basis_that_is_kept(chunk):
    found = []
    for each in (0, chunk):
        (delta,) = moved(NOLA(rank=3, k=12, l=9, chunk=each), site(20, 16))
        (update_of := delta(torch.eye(16).double())).square().sum().backward()
        found.append((update_of.detach(), delta.alpha.grad, delta.beta.grad))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_regeneration_has_gradients_of_single_examples():
    (delta,) = moved(NOLA(rank=3, k=12, chunk=5), site(20, 16))
    x = torch.randn(4, 2, 16).double()
    theta = {n: p.detach() for n, p in delta.named_parameters()}

    def loss(theta, x):
        return functional_call(delta, theta, (x,)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(theta, x)
    for name in theta:
        apart = torch.stack([grad(loss)(theta, each)[name] for each in x])
        torch.testing.assert_close(together[name], apart, rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """The most numbers that any new tensor held."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.most = max(self.most, t.numel())
        return out


def test_memory_grows_with_the_chunk_and_not_with_k():
    peaks = {}
    for k, chunk in ((64, 4), (256, 4), (64, 8)):
        (delta,), _, _ = built(NOLA(rank=4, k=k, chunk=chunk), site(64, 64))
        with Largest() as seen:
            delta(torch.randn(3, 64)).square().sum().backward()
        peaks[k, chunk] = seen.most
    assert peaks[64, 4] == peaks[256, 4] == 4 * 4 * 64
    assert peaks[64, 8] == 2 * peaks[64, 4]


@pytest.mark.parametrize("chunk", [0, 4])
def test_no_generator_of_the_process_is_touched(chunk):
    before = torch.random.get_rng_state()
    (delta,), _, _ = built(NOLA(rank=2, k=9, chunk=chunk), site(12, 10))
    delta(torch.ones(3, 10)).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_only_beta_moves_first():
    (delta,), _, _ = built(NOLA(rank=2, k=9), site(12, 10))
    assert torch.count_nonzero(update(delta)) == 0
    delta(torch.randn(3, 10)).square().add(1).pow(2).sum().backward()
    delta(torch.randn(3, 10)).sum().backward()
    assert torch.count_nonzero(delta.alpha.grad) == 0
    assert torch.count_nonzero(delta.beta.grad) == 9


def test_layers_of_one_shape_share_one_basis():
    a, b, c = built(NOLA(rank=2, k=9), site(12, 10, "a"), site(12, 10, "b"), site(14, 10, "c"))[0]
    assert a.bases[0].kept.on() is b.bases[0].kept.on() is c.bases[0].kept.on()
    assert a.bases[1].kept.on() is not c.bases[1].kept.on()
    assert a.A0.on() is not b.A0.on()
    one, two = built(NOLA(rank=2, k=9, share_basis=False), site(12, 10, "a"), site(12, 10, "b"))[0]
    assert not torch.equal(one.bases[0].kept.on(), two.bases[0].kept.on())


def test_merging_keeps_what_was_learnt():
    """The released merge multiplied the frozen inner weights alone, hence added exactly zero."""
    model = nn.Sequential(nn.Linear(10, 12))
    before = model[0].weight.detach().clone()
    adapter = fs.adapt(model, NOLA(rank=2, k=9), ["0"], train_modules=())
    with torch.no_grad():
        adapter.deltas["0"].beta.normal_()
    x = torch.randn(3, 10)
    wanted = model(x)
    adapter.merge()
    assert (model[0].weight - before).norm() > 0.1
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_only_coefficients_are_saved():
    (delta,), _, _ = built(NOLA(k=512), site(64, 64))
    assert {k: v.numel() for k, v in delta.state_dict().items()} == {"alpha": 512, "beta": 512}
    assert size_of_file(delta) < 8192


def test_more_terms_than_numbers_are_refused():
    with pytest.raises(PlanError, match=r"k=512.*2x10.*at most 20"):
        NOLA(rank=2).plan([site(12, 10)])
    with pytest.raises(PlanError, match=r"l=30.*2x12.*at most 24"):
        NOLA(rank=2, k=20, l=30).plan([site(12, 10)])


def test_the_basis_is_the_same_everywhere():
    (delta,), _, _ = built(NOLA(rank=2, k=3, seed=1), site(4, 6))
    assert delta.bases[0].kept.on()[0, :3].tolist() == [
        0.7716913223266602,
        -0.28461527824401855,
        0.34696221351623535,
    ]
    frozen = (delta.A0, delta.bases[0].kept, delta.bases[1].kept)
    assert [fingerprint(f.on()) for f in frozen] == [
        "8f6ba8248224f12f",
        "01fe02b2af112f28",
        "0ddb691c32e4e15a",
    ]


@pytest.mark.slow
def test_error_falls_with_k():
    torch.manual_seed(0)
    target = torch.outer(torch.randn(64), torch.randn(64))
    target /= target.norm()
    few, some, many = (fit(NOLA(k=k), target, rate=5e-2, steps=500) for k in (32, 128, 512))
    assert few > 0.9
    assert 0.6 < some < 0.85
    assert many < 0.05
