"""S2-LoRA: sparse ranks, the proximal step, the scale that must not leak."""

import pytest
import torch
from peers import Layers, built, moved, rank, site, size_of_file, update

import finespun as fs
from finespun.adapters.compact import compact
from finespun.contract import SiteShape, TensorSite
from finespun.driver import Driver
from finespun.methods.structures import S2LoRA

SITES = tuple(site(20, 12, name) for name in "abc")


def test_counts_of_the_comparison_table():
    for size, shared, operations in ((768, 49_152, 98_304), (4096, 262_144, 524_288)):
        shape = SiteShape("s", size, size)
        plan = S2LoRA().plan([TensorSite("s", torch.empty(size, size, device="meta"))])
        assert S2LoRA().num_parameters(shape) == 32
        assert S2LoRA().num_shared_parameters(plan) == shared
        assert S2LoRA().flops(shape) == pytest.approx(operations, rel=0.01)


def test_numbers_of_whisper_small():
    weight = torch.zeros(1, 1).expand(768, 768)
    sites = [TensorSite(f"{i}", weight) for i in range(144)]
    assert S2LoRA().total_parameters(S2LoRA().plan(sites)) == 53_760
    assert size_of_file(*built(S2LoRA(), *sites)[0]) < 230_000


def test_one_slice_for_all_shapes():
    form = S2LoRA(rank=4, share="slice")
    deltas, bank, plan = built(form, site(20, 12, "a"), site(8, 30, "b"))
    assert {n: tuple(p.shape) for n, p in bank.named_parameters()} == {
        "A_20x30": (4, 30),
        "B_20x30": (20, 4),
    }
    assert form.num_shared_parameters(plan) == 200
    assert torch.equal(deltas[1].shared()[0][:, :12], deltas[0].shared()[0])


def test_only_s_moves_first():
    (delta, *_), bank, _ = built(S2LoRA(rank=6), *SITES)
    delta(torch.randn(3, 12)).sum().backward()
    assert torch.count_nonzero(delta.s.grad) == 6
    assert all(torch.count_nonzero(p.grad) == 0 for p in bank.parameters())


def test_the_shared_pair_collects_the_gradients_of_all_sites():
    deltas = moved(S2LoRA(rank=6), *SITES[:2])
    bank, x = deltas[0].bank, torch.randn(3, 12).double()
    pair = list(bank.parameters())
    assert deltas[0].shared()[0].data_ptr() == deltas[1].shared()[0].data_ptr()
    each = [torch.autograd.grad(d(x).square().sum(), pair) for d in deltas]
    both = torch.autograd.grad(sum(d(x).square().sum() for d in deltas), pair)
    for got, one, other in zip(both, *each):
        torch.testing.assert_close(got, one + other, rtol=1e-12, atol=1e-12)


def test_a_support_that_was_switched_off_stays():
    model = Layers((12, 10))
    adapter = fs.adapt(model, S2LoRA(rank=6), ["fc0"], train_modules=())
    (delta,) = adapter.deltas.values()
    delta.s.data.normal_()
    for group in delta.groups("rank")[1:4]:
        delta.switch_off(group)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    Driver(model, "default", optimizer)
    before = delta.s.detach().clone()
    for _ in range(5):
        model.fc0(torch.randn(4, 10)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ((delta.s == 0) == (before == 0)).all()
    assert (delta.s != before).sum() == 3


def test_shrinking_is_soft_thresholding():
    (delta, *_) = moved(S2LoRA(rank=6), *SITES)
    delta.s.data = torch.tensor([0.5, -0.5, 0.1, -0.1, 0.0, 2.0], dtype=torch.float64)
    left = [group.shrink(delta, 0.2) for group in delta.groups("rank")]
    wanted = torch.tensor([0.3, -0.3, 0.0, 0.0, 0.0, 1.8], dtype=torch.float64)
    torch.testing.assert_close(delta.s.detach(), wanted, rtol=1e-12, atol=1e-12)
    assert (delta.s[2:5] == 0).all()
    assert left == pytest.approx(wanted.abs().tolist())


def test_each_site_becomes_a_lora_of_its_own_rank():
    form, deltas = S2LoRA(rank=6), moved(S2LoRA(rank=6), *SITES)
    for off, delta in enumerate(deltas, start=1):
        for group in delta.groups("rank")[:off]:
            delta.switch_off(group)
    before = [update(d) for d in deltas]
    assert [rank(d) for d in deltas] == [5, 4, 3]
    structure, plan, small = compact(form, form.plan(SITES), dict(zip("abc", deltas)))
    assert isinstance(structure, fs.LoRA)
    assert [plan.choices[n]["rank"] for n in "abc"] == [5, 4, 3]
    for name, wanted in zip("abc", before):
        torch.testing.assert_close(
            update(small[name].double()), wanted, rtol=1e-5, atol=1e-5, check_dtype=False
        )


@torch.no_grad()
def normalise(deltas):
    """Give every row of A and column of B norm 1 and multiply s by what they had: each ΔW stays.
    `deltas` are all those of one adapter."""
    bank = deltas[0].bank
    for out, inner in bank.sizes:
        A, B = bank.pair(out, inner)
        norms = [n.clamp_min(torch.finfo(n.dtype).tiny) for n in (A.norm(dim=1), B.norm(dim=0))]
        A.div_(norms[0][:, None])
        B.div_(norms[1])
        for delta in deltas:
            shape = delta.site.shape
            if len(bank.sizes) == 1 or (shape.out_features, shape.in_features) == (out, inner):
                delta.s.mul_(norms[0] * norms[1])


def test_normalising_leaves_every_update():
    for share in ("shape", "slice"):
        deltas = moved(S2LoRA(rank=5, share=share), *SITES, site(12, 20, "d"))
        before = [update(d) for d in deltas]
        normalise(deltas)
        for delta, wanted in zip(deltas, before):
            torch.testing.assert_close(update(delta), wanted, rtol=1e-12, atol=1e-12)
        for out, inner in deltas[0].bank.sizes:
            A, B = deltas[0].bank.pair(out, inner)
            for norms in (A.norm(dim=1), B.norm(dim=0)):
                torch.testing.assert_close(norms, torch.ones(5).double())


@pytest.mark.slow
def test_the_proximal_step_finds_the_zeros_and_a_penalty_in_the_loss_none():
    """Six 64² matrices of three of eight true directions each, r = 12, 1,500 Adam steps."""
    sites = tuple(site(64, 64, f"s{i}") for i in range(6))
    g = torch.Generator().manual_seed(2)
    U, V = (torch.linalg.qr(torch.randn(64, 8, generator=g)).Q for _ in "UV")
    targets = []
    for _ in sites:
        chosen = torch.randperm(8, generator=g)[:3]
        targets.append(U[:, chosen] @ torch.diag(1 + torch.rand(3, generator=g)) @ V[:, chosen].T)

    def train(proximal, penalty):
        torch.manual_seed(0)
        deltas, bank, _ = built(S2LoRA(rank=12), *sites)
        own = [d.s for d in deltas]
        optimizer = torch.optim.Adam(
            [{"params": bank.parameters()}, {"params": own}], lr=5e-3, betas=(0.9, 0.99)
        )
        for step in range(1500):
            rate = 5e-3 * (1 - step / 1500)
            for each in optimizer.param_groups:
                each["lr"] = rate
            x = torch.randn(32, 64)
            loss = sum((d(x) - x @ T.T).square().mean() for d, T in zip(deltas, targets))
            loss = loss + penalty * sum(s.abs().sum() for s in own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            normalise(deltas)
            if proximal and step < 1350:
                for delta in deltas:
                    delta.s.data = torch.nn.functional.softshrink(delta.s.data, rate * proximal)
            elif proximal:
                for delta in deltas:
                    delta.s.data *= delta.s.data.abs() > 1e-3
        missed = sum(float((update(d) - T).norm() ** 2) for d, T in zip(deltas, targets))
        total = sum(float(T.norm() ** 2) for T in targets)
        return float((torch.stack(own) == 0).float().mean()), (missed / total) ** 0.5

    zeros, error = train(proximal=1.0, penalty=0.0)
    assert 0.7 <= zeros <= 0.8
    assert error <= 0.02
    zeros, _ = train(proximal=0.0, penalty=0.02)
    assert zeros == 0.0
