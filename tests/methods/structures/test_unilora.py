"""Uni-LoRA: the isometry, the balanced map, PEFT's outputs and the faults of the official code."""

import pytest
import torch
from peers import agrees, built, fingerprint, give, moved, peft, rank, site, size_of_file, update

import finespun as fs
from finespun.contract import SiteShape, TensorSite
from finespun.linalg import streams
from finespun.methods.structures import UniLoRA
from finespun.methods.structures.unilora import spread

SITES = tuple(site(24, 16, name) for name in ("b", "a", "c"))


def projection(bank):
    """P (D, d), from its action on the columns of the identity."""
    theta = bank.theta
    columns = []
    for one in torch.eye(len(theta)).double():
        theta.data = one
        columns.append(bank.unfold().detach())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("size", [37, 160, 480])
def test_the_projection_is_an_isometry(size):
    _, bank, plan = built(UniLoRA(size=size), *SITES)
    assert plan.shared == {"total": 480, "size": size}
    P = projection(bank)
    torch.testing.assert_close(P.T @ P, torch.eye(size).double(), rtol=0, atol=1e-12)
    assert ((P != 0).sum(1) == 1).all()
    assert set((P != 0).sum(0).tolist()) <= {480 // size, -(-480 // size)}


def test_scales_belong_to_the_columns_that_are_read():
    """The official GLUE code took counts from a map that it then shuffled."""
    _, bank, _ = built(UniLoRA(size=37), *SITES)
    index = bank.index.on().long()
    bank.theta.data = torch.ones(37).double()
    uses = index.bincount(minlength=37).double()
    assert uses.unique().tolist() == [12, 13]
    torch.testing.assert_close(bank.unfold().detach(), uses[index].rsqrt(), rtol=1e-15, atol=0)


def sized(layers, width):
    return [TensorSite(f"{i:02}", torch.empty(width, width, device="meta")) for i in range(layers)]


def test_sizes_of_published_models():
    base = UniLoRA(size=23_040).plan(sized(24, 768))
    assert base.shared == {"total": 147_456, "size": 23_040}
    assert UniLoRA().total_parameters(base) == 23_040
    assert UniLoRA(size=23_040).plan(sized(48, 1024)).shared["total"] == 393_216
    counts = spread(streams.key(0, "unilora", "columns"), (147_456, 23_040)).bincount()
    assert counts.unique().tolist() == [6, 7]
    assert UniLoRA().plan(sized(24, 768)).shared["size"] == 7_372
    assert UniLoRA(size=10**6).plan(sized(2, 64)).shared["size"] == 1_024


def test_counts_of_the_comparison_table():
    for size, token in ((768, 12_288), (4096, 65_536)):
        shape = SiteShape("s", size, size)
        assert UniLoRA().num_parameters(shape) == 0
        assert UniLoRA().flops(shape, 1) - UniLoRA().flops(shape, 0) == token


def test_the_gradient_is_the_projected_one():
    deltas = moved(UniLoRA(size=37), *SITES)
    bank = deltas[0].bank
    x, g = torch.randn(3, 16).double(), torch.randn(3, 24).double()
    got = torch.autograd.grad(sum((d(x) * g).sum() for d in deltas), bank.theta)[0]
    flat = {}
    for delta in deltas:
        A, B = (t.detach().requires_grad_() for t in delta.low_rank())
        dA, dB = torch.autograd.grad((x @ A.T @ B.T * g).sum(), (A, B))
        flat[delta.offset] = torch.cat([dA.flatten(), dB.flatten()])
    together = torch.cat([flat[offset] for offset in sorted(flat)])
    torch.testing.assert_close(got, projection(bank).T @ together, rtol=1e-10, atol=1e-10)


def test_as_many_numbers_as_lora_is_lora():
    """With d = D every entry is its own: the same losses as LoRA from the same start."""
    torch.manual_seed(0)
    target, x = torch.randn(24, 16), torch.randn(64, 16)
    (uni,), bank, _ = built(UniLoRA(size=160, bound=0.5), SITES[0])
    (lora,), _, _ = built(fs.LoRA(alpha=4.0, rank=4), SITES[0])
    for own, start in zip((lora.A, lora.B), uni.low_rank()):
        own.data.copy_(start)
    curves = []
    for delta, numbers in ((uni, bank.parameters()), (lora, lora.parameters())):
        optimizer = torch.optim.Adam(numbers, lr=1e-2)
        curve = []
        for _ in range(30):
            loss = (delta(x) - x @ target.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_outputs_are_pefts():
    from peft import UniLoraConfig

    shapes = ((24, 16), (20, 30))
    model = peft(UniLoraConfig(r=4, theta_d_length=64), *shapes)
    deltas, bank, plan = built(
        UniLoRA(size=64), *(site(*s, f"fc{i}") for i, s in enumerate(shapes))
    )
    layers = (model.fc0, model.fc1)
    index = torch.cat(
        [
            each["default"].flatten()
            for m in layers
            for each in (m.unilora_indices_A, m.unilora_indices_B)
        ]
    ).long()
    assert len(index) == plan.shared["total"]
    order = index.bincount().argsort(descending=True, stable=True)
    give(bank.index, order.argsort()[index])
    bank.theta.data.copy_(model.fc0.unilora_theta_d["default"][order])
    for delta, layer in zip(deltas, layers):
        assert agrees(delta, layer) <= 1e-5


def test_the_rank_is_r_and_one_start_differs_from_the_base():
    deltas = moved(UniLoRA(size=100), *SITES)
    assert [rank(d) for d in deltas] == [4, 4, 4]
    fresh, bank, _ = built(UniLoRA(size=960), site(768, 768))
    assert bank.theta.abs().max() <= 0.02
    assert float(update(fresh[0]).norm()) == pytest.approx(0.03, abs=0.005)


def test_the_map_follows_names_and_not_their_order():
    one, other = (UniLoRA(size=37).plan(s) for s in (SITES, SITES[::-1]))
    assert one.choices == other.choices
    assert [one.choices[n]["offset"] for n in "abc"] == [0, 160, 320]


def test_the_map_is_the_same_everywhere():
    _, bank, _ = built(UniLoRA(size=37, seed=1), *SITES)
    assert bank.index.on()[:5].tolist() == [17, 18, 1, 4, 17]
    assert fingerprint(bank.index.on()) == "cad292de3fb24a00"
    assert {n for n, _ in bank.named_parameters()} == set(bank.state_dict()) == {"theta"}
    assert size_of_file(*built(UniLoRA(size=37), *SITES)[0]) < 4 * 37 + 8192


@pytest.mark.slow
def test_rates_grow_with_the_root_of_the_copies():
    """Six 64² matrices, r = 4, a target that can be reached, 400 Adam steps."""
    sites = tuple(site(64, 64, f"s{i}") for i in range(6))

    def error(copies, rate):
        torch.manual_seed(0)
        form = UniLoRA(size=3072 // copies, bound=0.02)
        deltas, bank, _ = built(form, *sites)
        with torch.no_grad():
            start = bank.theta.clone()
            bank.theta.copy_(torch.randn(len(start)) * 0.088 * copies**0.5)
            targets = [update(d).float() for d in deltas]
            bank.theta.copy_(start)
        optimizer = torch.optim.Adam([bank.theta], lr=rate)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 400)
            x = torch.randn(64, 64)
            loss = sum((d(x) - x @ T.T).square().mean() for d, T in zip(deltas, targets))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        missed = sum(float((update(d) - T).norm() ** 2) for d, T in zip(deltas, targets))
        return (missed / sum(float(T.norm() ** 2) for T in targets)) ** 0.5

    assert [error(copies, 4e-3) > least for copies, least in ((16, 0.05), (64, 0.2))] == [True] * 2
    for copies in (1, 16, 64):
        assert error(copies, 4e-3 * copies**0.5) < 0.01
