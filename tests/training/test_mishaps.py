"""What happens when something goes wrong on the way, or is asked twice."""

import pytest
import torch
from suite import CASES, adapted, batch, bytes_of, net, relative, stirred

import finespun as fs
from finespun.contract import module_group
from finespun.driver import Driver
from finespun.errors import InputError, StateError


def case(name):
    return next(c for c in CASES if c.name == name)


def test_compacting_what_was_never_switched_off_changes_nothing():
    model, adapter = stirred(case("uni"), net())
    y, numbers, bank = model(batch()), adapter.num_update_parameters, adapter.attached.bank
    adapter.compact()
    assert torch.equal(model(batch()), y)
    assert (adapter.num_update_parameters, adapter.attached.bank) == (numbers, bank)


def test_a_gated_update_with_a_bank_becomes_loras_and_the_bank_goes():
    model, adapter = stirred(case("uni"), net())
    for delta in adapter.deltas.values():
        rank = len(delta.low_rank()[0])
        delta.set_gate(torch.tensor([1.0] + [0.0] * (rank - 1)))
    y = model(batch())
    adapter.compact()
    assert adapter.structure.kind == "lora"
    assert {len(d.A) for d in adapter.deltas.values()} == {1}
    assert adapter.attached.bank is None
    assert not any("bank" in name for name in model.state_dict())
    assert relative(model(batch()), y) < 1e-6
    assert all(p.requires_grad for p in adapter.parameters())


def test_a_gate_needs_factors():
    with pytest.raises(StateError, match="no ranks to gate"):
        case("hira").delta().set_gate(torch.zeros(2))


def test_an_error_while_merging_in_place_is_said_and_nothing_goes_on_as_before():
    model, adapter = stirred(case("lora"), net())
    before = bytes_of(model)

    def fail(*_):
        raise MemoryError("no room")

    list(adapter.deltas.values())[-1].__dict__["factors"] = fail
    with pytest.raises(StateError, match="reload the model"):
        adapter.merge(undo="none")
    now = bytes_of(model)
    assert any(not torch.equal(before[k], now[k]) for k in before)
    with pytest.raises(StateError, match="reload the model"):
        adapter.merge()
    with pytest.raises(StateError, match="reload the model"):
        adapter.unmerge()


def test_tensors_that_do_not_fit_leave_no_start_behind():
    _, whole = stirred(case("lsr-shadow"), net())
    saved = {k: v.clone() for k, v in whole.attached.tensors().items()}
    missing = next(k for k in saved if k.role != "start")
    del saved[missing]
    _, other = adapted(case("lsr"), net())
    with pytest.raises(InputError, match="missing"):
        other.attached.load(saved)
    assert all(delta.origin is None for delta in other.deltas.values())


def test_an_adapter_can_be_trained_again_after_a_later_one_is_gone():
    model, first = stirred(case("lora"), net(), name="one")
    base = [p for n, p in model.named_parameters() if ".deltas." not in n]
    _, second = stirred(case("lsr"), model, name="another")
    assert not any(p.requires_grad for p in first.parameters())
    second.detach()
    assert all(p.requires_grad for p in first.parameters())
    assert not any(p.requires_grad for p in base)
    first.detach()
    assert all(p.requires_grad for p in base)


def test_the_base_stays_frozen_when_the_first_of_two_goes_first():
    model, first = stirred(case("lora"), net(), name="one")
    base = [p for n, p in model.named_parameters() if ".deltas." not in n]
    _, second = stirred(case("lsr"), model, name="another")
    first.detach()
    assert not any(p.requires_grad for p in base)
    assert all(p.requires_grad for p in second.parameters())
    second.detach()
    assert all(p.requires_grad for p in base)


@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_a_bank_is_watched_in_the_first_real_step(lr):
    model, adapter = stirred(case("uni"), net().train())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=lr)
    driver = Driver(model, "default", optimizer)
    model(batch()).sum().backward()
    optimizer.step()
    assert driver.checked == (lr > 0)


def test_a_module_switched_off_on_purpose_is_not_warned_of(recwarn):
    model, adapter = stirred(case("lora"), net().train())
    delta = next(iter(adapter.deltas.values()))
    delta.switch_off(module_group(delta))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    Driver(model, "default", optimizer)
    model(batch()).sum().backward()
    optimizer.step()
    assert not [w for w in recwarn if "did not move" in str(w.message)]


def test_merging_says_how_many_bytes_it_keeps():
    model, adapter = stirred(case("ia3"), net())
    layers = [d.site.layer for d in adapter.deltas.values()]
    kept = sum(layer.weight.nbytes + layer.bias.nbytes for layer in layers)
    assert adapter.merge() == kept
    assert isinstance(fs.Adapter(model, "default"), fs.Adapter)


def test_a_bank_on_a_sequential_root_changes_nothing():
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()), torch.randn(3, 8)
    y = model(x)
    adapter = fs.adapt(model, fs.make("tied_lora", rank=2), ["0"])
    assert torch.equal(model(x), y)
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.detach()
    assert len(model) == 2
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "x", None])
def test_a_weight_must_be_a_finite_number(weight):
    model, _ = stirred(case("lora"), net())
    with pytest.raises(InputError, match="finite number"):
        fs.activate(model, {"default": weight})


def test_nothing_else_is_activated_while_an_adapter_is_merged():
    model, adapter = stirred(case("lora"), net())
    adapter.merge()
    y = model(batch())
    for change in (
        lambda: fs.activate(model, None),
        lambda: fs.activate(model, {"default": 0.5}),
        lambda: fs.adapt(model, fs.LoRA(rank=1), ["up"], name="b"),
    ):
        with pytest.raises(StateError, match="unmerge it first"):
            change()
    adapter.activate()
    assert torch.equal(model(batch()), y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: fs.LoRA(rank="4"), "rank='4' must be a whole number"),
        (lambda m: fs.LSR(rank=2.5), "whole number"),
        (lambda m: fs.LoRA(rank=True), "whole number"),
        (lambda m: fs.adapt(m, 8, ["up"]), "a name or an instance"),
        (lambda m: fs.adapt(m, fs.LoRA, ["up"]), r"fs\.LoRA\("),
        (lambda m: fs.adapt(m, fs.LoRA(), 3), "targets are names"),
        (lambda m: fs.adapt(m, fs.LoRA(), [3]), "targets are names"),
        (lambda m: fs.adapt(m, fs.LoRA(rank=1), ["up"], train_modules="haed"), "called 'haed'"),
        (lambda m: fs.adapt(m, fs.LoRA(rank=1), ["head"], train_modules=["head"]), "whole: head;"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(call, message):
    with pytest.raises(InputError, match=message):
        call(net())


@pytest.mark.parametrize("names", ["ab", [0, 1], [b"x"]])
def test_rows_take_names(names):
    model, _ = stirred(case("lora"), net())
    with pytest.raises(InputError, match="a name, or None, for each row"):
        fs.rows(model, names).__enter__()
