"""Every value of dynamics and objectives in a run: resumed, accumulated, scaled, refused."""

import copy

import pytest
import torch
from axis_runs import LORA, LSR, STEPS, Losing, parameters, ready, rows, step
from tiers import sampled

import finespun as fs
from finespun.driver import Driver, prepare
from finespun.errors import InputError, TrainingError
from finespun.methods.dynamics import (
    GGPO,
    MGPO,
    ALLoRA,
    LoRAFA,
    LoRAPlus,
    LoRAPro,
    Muon,
    Riemannian,
)
from finespun.methods.objectives import GLAD, BALoRA

VALUES = {
    "lora_plus": LoRAPlus(ratio=4.0),
    "riemannian": Riemannian(),
    "lora_fa": LoRAFA(),
    "light": LoRAPro(),
    "sgd": LoRAPro(mode="sgd"),
    "full": LoRAPro(mode="full"),
    "factored": LoRAPro(mode="factored"),
    "allora": ALLoRA(),
    "mgpo": MGPO(),
    "mgpo-weights": MGPO(space="weights", sign=-1),
    "ggpo": GGPO(refresh=2),
    "ggpo-compat": GGPO(form="compat"),
    "muon": Muon(),
    "ba_lora": BALoRA(head="own"),
    "ba_lora-warm": BALoRA(head="warm"),
    "glad": GLAD(),
    "glad-every": GLAD(rule="orth", every=2),
}
EVERY = pytest.mark.parametrize("name", sampled(VALUES, 0.2))
FORMS = pytest.mark.parametrize("structure", [LORA, LSR], ids=["lora", "lsr"])


def run(value, structure, first=0, last=STEPS, state=None, micros=3, **options):
    model, adapter, optimizer, driver = ready(value, structure, **options)
    if state is not None:
        with torch.no_grad():
            for p, kept in zip(adapter.parameters(), state["parameters"]):
                p.copy_(kept)
        optimizer.load_state_dict(state["optimizer"])
        driver.load_state_dict(state["driver"])
    with driver:
        for number in range(first, last):
            step(model, optimizer, driver, number, micros)
        saved = {
            "parameters": parameters(adapter),
            "optimizer": optimizer.state_dict(),
            "driver": driver.state_dict(),
        }
    return adapter, copy.deepcopy(saved)


@FORMS
@EVERY
def test_a_run_in_two_parts_is_the_run(name, structure):
    """6 steps = 3 + a checkpoint + 3, bit for bit, of 3 micro-batches each."""
    whole, _ = run(VALUES[name], structure)
    _, half = run(VALUES[name], structure, last=3)
    again, _ = run(VALUES[name], structure, first=3, state=half)
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(again)))
    plain, _ = run(None, structure)
    assert any(not torch.equal(a, b) for a, b in zip(parameters(whole), parameters(plain)))


@EVERY
def test_the_base_is_as_it_was(name):
    model, _, optimizer, driver = ready(VALUES[name], LSR)
    base = {n: t.clone() for n, t in model.state_dict().items() if "delta" not in n}
    with driver:
        for number in range(3):
            step(model, optimizer, driver, number, 2)
    assert all(torch.equal(base[n], t) for n, t in model.state_dict().items() if n in base)


@EVERY
def test_it_learns_under_bf16_autocast(name):
    adapter, _ = run(VALUES[name], LORA, autocast=True, last=3)
    assert all(bool(torch.isfinite(p).all()) for p in adapter.parameters())


@EVERY
def test_from_a_zero_start_nothing_is_nan(name):
    adapter, _ = run(VALUES[name], LSR, stirred=False)
    assert all(bool(torch.isfinite(p).all()) for p in adapter.parameters())
    assert max(adapter.norms().values()) > 0


@EVERY
def test_gradients_under_a_scaler_are_those_without(name):
    """Scaled by 8, a power of two: the same step, bit for bit."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0)):
        model, adapter, optimizer, driver = ready(VALUES[name], LORA)
        with driver:
            for number in range(2):
                step(model, optimizer, driver, number, 1, scaler)
        found.append(parameters(adapter))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def refused(value, structure=LORA, optimizer=None, match=""):
    with pytest.raises(InputError, match=match):
        ready(value, structure, optimizer=optimizer)


def test_what_cannot_be_done_is_refused_by_name():
    refused(LoRAPro(mode="full"), optimizer=torch.optim.AdamW, match="lora_pro is an optimiser")
    refused(Muon(), optimizer=torch.optim.AdamW, match="muon is an optimiser")
    refused(MGPO(), optimizer=lambda g: torch.optim.SGD(g, lr=0.1), match="follows the momentum")
    refused(LoRAPlus(), fs.IA3(), match="treats A and B apart")
    with pytest.raises(InputError, match="whole blocks"):
        GGPO().suits(fs.LoR2C(rank=2))
    for bad in (
        lambda: LoRAPro(mode="half"),
        lambda: LoRAPlus(ratio=0.0),
        lambda: ALLoRA(eta=-1.0),
        lambda: MGPO(sign=2),
        lambda: Muon(momentum=1.0),
        lambda: GLAD(lam=2.0),
        lambda: BALoRA(spectrum=-1.0),
    ):
        with pytest.raises(InputError, match=r"try|must be"):
            bad()


def test_two_steppers_are_refused():
    model = Losing().train()
    fs.adapt(model, LORA, ["up", "down"], ())
    with pytest.raises(InputError, match="lora_pro and muon are each an optimiser"):
        prepare(model, "default", [LoRAPro(mode="full"), Muon()], steps=STEPS)


@FORMS
def test_lora_plus_has_another_rate_for_b(structure):
    _, adapter, optimizer, _ = ready(LoRAPlus(ratio=4.0), structure)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for delta in adapter.deltas.values():
        for name, p in delta.named_parameters():
            assert rates[id(p)] == pytest.approx(0.08 if name.startswith("B") else 0.02)


@FORMS
def test_lora_fa_keeps_a(structure):
    model, adapter, optimizer, driver = ready(LoRAFA(), structure)
    own = [(n, p) for d in adapter.deltas.values() for n, p in d.named_parameters()]
    before = [p.detach().clone() for _, p in own]
    with driver:
        step(model, optimizer, driver, 0)
    for (name, p), old in zip(own, before):
        assert torch.equal(p, old) == name.startswith("A"), name


def test_sigma_zero_is_plain_and_evaluation_has_no_noise():
    noisy, _ = run(GGPO(sigma=0.0), LORA)
    plain, _ = run(None, LORA)
    assert all(torch.equal(a, b) for a, b in zip(parameters(noisy), parameters(plain)))
    model, _, _, driver = ready(GGPO(sigma=0.5), LORA)
    with driver:
        quiet = model.eval()(**rows(1)).logits
        loud = model.train()(**rows(1)).logits
        assert torch.equal(model.eval()(**rows(1)).logits, quiet)
        assert not torch.allclose(loud, quiet)


def test_mgpo_moves_by_rho_and_comes_back():
    model, adapter, optimizer, driver = ready(MGPO(rho=0.3), LORA)
    with driver:
        step(model, optimizer, driver, 0)
        before, size = parameters(adapter), driver.hooks[0].size
        driver.micro_batch(True, 1.0)
        model(**rows(5)).loss.backward()
        moved = torch.stack([(p - q).norm() for p, q in zip(adapter.parameters(), before)]).norm()
        assert float(moved.detach()) == pytest.approx(0.3 * min(1 / size, 10.0), rel=1e-4)
        model.eval()(**rows(5))
        assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), before))


# --- GLAD -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", ["blend", "orth", "bisect"])
def test_lam_zero_is_plain_bit_for_bit(rule):
    glad, _ = run(GLAD(lam=0.0, rule=rule), LORA)
    plain, _ = run(None, LORA)
    assert all(torch.equal(a, b) for a, b in zip(parameters(glad), parameters(plain)))


def test_lam_one_is_sam():
    """The gradient after ρ g / ‖g‖, of all micro-batches, by hand."""
    model, adapter, optimizer, driver = ready(GLAD(lam=1.0, rho=0.1), LORA, clip=0.0)
    mine, own, _, quiet = ready(None, LORA, clip=0.0)
    quiet.close(finished=False)

    def slope():
        total = sum(mine(**rows(m)).loss / 3 for m in range(3))
        return torch.autograd.grad(total, own.parameters())

    g = slope()
    size = torch.stack([t.norm() for t in g]).norm()
    with torch.no_grad():
        for p, t in zip(own.parameters(), g):
            p.add_(t * (0.1 / size))
    wanted = slope()
    optimizer.zero_grad()
    for micro in range(3):
        driver.micro_batch(micro == 0, 1 / 3)
        (model(**rows(micro)).loss / 3).backward()
    before = parameters(adapter)
    driver._call("gradients_ready")
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(adapter)))
    for p, w in zip(adapter.parameters(), wanted):
        torch.testing.assert_close(p.grad, w, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_the_models_is_refused():
    model, _, optimizer, _ = ready(GLAD(), LORA)
    model(**rows(1)).logits.square().sum().backward()
    with pytest.raises(TrainingError, match="this loop's loss is another"):
        optimizer.step()


def test_parameters_come_back_when_the_second_pass_fails():
    model, adapter, optimizer, driver = ready(GLAD(), LORA)
    step(model, optimizer, driver, 0)
    before = parameters(adapter)
    driver.micro_batch(True, 1.0)
    model(**rows(1)).loss.backward()

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    model.forward = broken
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(adapter)))
    assert isinstance(driver, Driver)
