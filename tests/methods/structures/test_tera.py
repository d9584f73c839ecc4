"""TeRA: three ways to one matrix, its ranks, its counts and its start."""

import pytest
import torch
from peers import built, fingerprint, fit, moved, rank, site, update

from finespun.contract import SiteShape
from finespun.errors import PlanError
from finespun.methods.structures import TeRA


def test_einsum_matrix_form_and_modes_are_one():
    (delta,) = moved(TeRA(ranks=(3, 4, 5, 2), alpha=3.0), site(96, 96))
    U = [u[0] for u in delta.scaled()]
    G = delta.G.on().double().view(3, 4, 5, 2)
    W = torch.einsum("abcd,ia,jb,kc,ld->ijkl", G, *U).reshape(96, 96) * 3 / 96**0.5
    A, B = delta.low_rank()
    assert A.shape == (10, 96)
    torch.testing.assert_close(delta.scale * B @ A, W, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 3, 96).double()
    torch.testing.assert_close(delta(x), x @ W.T, rtol=1e-12, atol=1e-12)


def test_padded_sides():
    (delta,) = moved(TeRA(rank=3), site(97, 71))
    x = torch.randn(3, 71).double()
    assert len(delta.d1) == 3
    torch.testing.assert_close(delta(x), x @ update(delta).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [((8, 8, 8, 8), 64), ((4, 4, 4, 4), 16), ((2, 2, 8, 8), 4), ((8, 12, 8, 12), 96)],
)
def test_ranks(ranks, expected):
    (delta,) = moved(TeRA(ranks=ranks), site(96, 96))
    assert rank(delta) == expected
    assert len(delta.low_rank()[0]) == expected


def test_counts_of_the_comparison_table():
    """The table takes 208,896 operations at 768²; the better order of one side saves 2 %."""
    small, large = SiteShape("s", 768, 768), SiteShape("s", 4096, 4096)
    assert TeRA().num_parameters(small) == TeRA().num_parameters(large) == 64
    assert TeRA(rank=64).num_parameters(large) == 256
    assert TeRA().flops(small) == 204_800
    assert TeRA().flops(large) == 458_752


def test_only_the_first_vector_has_a_gradient_at_first():
    (delta,), _, _ = built(TeRA(rank=4), site(30, 24))
    assert torch.count_nonzero(update(delta)) == 0
    x, g = torch.randn(5, 24), torch.randn(5, 30)

    def gradients():
        delta.zero_grad()
        (delta(x) * g).sum().backward()
        return [int(torch.count_nonzero(d.grad)) for d in delta.parameters()]

    assert gradients() == [4, 0, 0, 0]
    delta.d1.data -= 0.1 * delta.d1.grad
    assert gradients() == [4, 4, 4, 4]


def test_entries_have_variance_one_at_the_start():
    squares = []
    for seed in range(50):
        (delta,), _, _ = built(TeRA(seed=seed), site(256, 256))
        delta.d1.data.fill_(1.0)
        squares.append(float((update(delta) / delta.scale).square().mean()))
    assert sum(squares) / 50 == pytest.approx(1, rel=0.05)


def test_layers_of_one_shape_share_the_network():
    a, b, c = built(TeRA(rank=3), site(30, 24, "a"), site(30, 24, "b"), site(24, 30, "c"))[0]
    for one, two, three in zip([*a.U, a.G], [*b.U, b.G], [*c.U, c.G]):
        assert one.on().data_ptr() == two.on().data_ptr() != three.on().data_ptr()
    assert sum(p.numel() for p in a.state_dict().values()) == 12


def test_the_file_of_a_whole_model_is_small():
    """32 blocks of 7 matrices, R = 16: 57 KB and the keys."""
    (delta,), _, _ = built(TeRA(), site(256, 256))
    assert 224 * sum(v.numel() for v in delta.state_dict().values()) * 4 == 57_344


def test_the_network_is_the_same_everywhere():
    (delta,), _, _ = built(TeRA(rank=2, seed=1), site(6, 6))
    assert [fingerprint(f.on()) for f in (delta.U[0], delta.G)] == [
        "f4bf164cfbb58f49",
        "4a8fdfd8ea2ee4a4",
    ]


def test_a_rank_beyond_a_mode_is_named():
    with pytest.raises(PlanError, match=r"R1=16.*I1=5.*'site'.*40 = 5·8.*1 to 5"):
        TeRA().plan([site(40, 24)])


@pytest.mark.slow
def test_large_rates_are_needed():
    shape = site(64, 64)
    form = TeRA(rank=8, alpha=64**0.5 / 64)
    (teacher,), _, _ = built(form, shape)
    g = torch.Generator().manual_seed(0)
    for p in teacher.parameters():
        p.data = torch.randn(p.shape, generator=g)
    target = update(teacher).float()
    target /= target.norm()
    torch.manual_seed(0)
    assert fit(form, target, rate=1e-2, steps=800, rows=32) < 0.02
    assert fit(form, target, rate=1e-3, steps=800, rows=32) > 0.9


def test_sizes_below_the_layers_are_refused():
    """As a damaged file may tell them."""
    form, shape = TeRA(rank=8), site(64, 64)
    plan = form.plan([shape])
    wrong = plan.choose(shape.shape.name, sizes=[4, 8, 8, 8])
    with pytest.raises(PlanError, match=r"sizes \[4, 8, 8, 8\] of .* are less than its 64x64"):
        form.build(shape, wrong)
