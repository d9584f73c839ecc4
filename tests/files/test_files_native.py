"""Finespun's own format: exact round trips, and refusals that name what is wrong."""

import json
import shutil
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from suite import batch, bytes_of, every, net, relative, same, stirred

import finespun as fs
from finespun import hosts
from finespun.errors import (
    InputError,
    StateError,
)
from finespun.files import Lineage, Parent, lineage_of, read_adapter, register_saved
from finespun.methods.structures import STRUCTURES

LORA, TARGETS = fs.LoRA(rank=2), r"blocks\.\d\.up"


@pytest.fixture
def saved(tmp_path):
    """A folder with a stirred LoRA and a head of its own, and the output it gave."""
    model = net()
    adapter = fs.adapt(model, LORA, TARGETS, ("head",), "first")
    for p in adapter.parameters():
        p.data.add_(torch.randn_like(p))
    adapter.save(tmp_path / "a")
    return tmp_path / "a", model(batch())


@every()
def test_every_structure_comes_back_exactly(case, tmp_path):
    STRUCTURES[case.structure.kind] = type(case.structure)
    model, adapter = stirred(case, train=("head",))
    adapter.scale = 0.7
    for p in adapter.parameters():
        p.requires_grad_(False)  # torch.matmul rounds otherwise for numbers that are trained
    x = batch()
    wanted, before = model(x), bytes_of(net())
    adapter.save(tmp_path / "a")
    other = net()
    again = fs.load(other, tmp_path / "a")
    assert torch.equal(other(x), wanted)
    assert again.structure == adapter.structure
    assert again.attached.plan == adapter.attached.plan
    assert again.scale == 0.7
    assert again.num_update_parameters == adapter.num_update_parameters
    assert not any(p.requires_grad for p in again.parameters())
    again.save(tmp_path / "b")
    assert load_equal(tmp_path / "a", tmp_path / "b")
    again.detach()
    assert same(bytes_of(other), before)


def load_equal(one: Path, other: Path) -> bool:
    """Whether two folders hold the same adapter, the date included."""
    return all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in ("adapter.safetensors", "adapter.json")
    )


def test_a_loaded_adapter_can_be_trained_further(saved):
    model = net()
    adapter = fs.load(model, saved[0], trainable=True)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(batch()).square().sum().backward()
    optimizer.step()
    assert all(p.requires_grad for p in adapter.parameters())
    assert not torch.equal(model(batch()), saved[1])
    assert not any(p.requires_grad for n, p in model.named_parameters() if "norm" in n)


def test_what_was_switched_off_or_gated_stays_so(tmp_path):
    model = net()
    adapter = fs.adapt(model, fs.LoRA(rank=3), TARGETS, ())
    for p in adapter.parameters():
        p.data.add_(torch.randn_like(p))
    first, second = adapter.deltas.values()
    first.switch_off(first.groups("rank")[1])
    second.set_gate(torch.tensor([0.5, 0.0, 2.0]))
    adapter.save(tmp_path / "a")
    other = net()
    again = fs.load(other, tmp_path / "a")
    assert torch.equal(other(batch()), model(batch()))
    mine = again.deltas["blocks.0.up"]
    assert torch.equal(mine.masks()["A"], first.masks()["A"])
    assert [g.label for g in mine.live("rank")] == ["rank 0", "rank 2"]
    again.compact()
    again.save(tmp_path / "small")
    third = net()
    fs.load(third, tmp_path / "small")
    assert relative(third(batch()), model(batch())) < 1e-6
    ranks = [len(d.A) for d in hosts.adapter_set_of(third)["default"].deltas.values()]
    assert ranks == [2, 2]


def test_other_precisions_of_the_numbers_come_back_too(tmp_path):
    model = net()
    adapter = fs.adapt(model, LORA, TARGETS, ())
    for d in adapter.deltas.values():
        d.A.data, d.B.data = d.A.data.bfloat16(), torch.randn_like(d.B).bfloat16()
    adapter.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter.json").read_text())["dtypes"] == {"bfloat16": 4}
    found = read_adapter(tmp_path / "a").state.tensors
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    again = fs.load(net(), tmp_path / "a")
    for name, delta in adapter.deltas.items():
        assert torch.equal(again.deltas[name].B.float(), delta.B.float())


def test_a_registered_adapter_holds_its_bytes_and_no_modules(saved):
    model = net()
    for i in range(20):
        register_saved(model, read_adapter(saved[0]).named(f"no{i}"))
    board = hosts.adapter_set_of(model)
    numbers = 2 * 2 * (24 + 40) + 5 * 25
    for state in board.states.values():
        held = state.tensors.data.nbytes
        assert 4 * numbers <= held <= 4 * numbers + 16 * len(state.form.table)
    assert not board.attached
    assert torch.equal(model(batch()), net()(batch()))
    fs.activate(model, "no7")
    assert torch.equal(model(batch()), saved[1])
    assert list(board.attached) == ["no7"]


def test_saving_does_not_depend_on_being_active_merged_or_live(tmp_path):
    model = net()
    adapter = fs.adapt(model, LORA, TARGETS, ())
    for p in adapter.parameters():
        p.data.add_(torch.randn_like(p))
    line = lineage_of(LORA)
    adapter.save(tmp_path / "a", line)
    adapter.merge()
    adapter.save(tmp_path / "b", line)
    adapter.unmerge()
    fs.activate(model, None)
    adapter.save(tmp_path / "c", line)
    fs.evict(model, "default")
    adapter.save(tmp_path / "d", line)
    for other in "bcd":
        assert load_equal(tmp_path / "a", tmp_path / other)


def test_lineage_is_kept_through_load_and_save(tmp_path):
    model = net()
    adapter = fs.adapt(model, LORA, TARGETS, ())
    line = lineage_of(
        LORA,
        recipe="model: net\n",
        metrics={"accuracy": 0.5, "loss": float("nan")},
        seeds={"training": 3},
        parents=(Parent("mother", "ab" * 32),),
    )
    adapter.save(tmp_path / "a", line)
    again = fs.load(net(), tmp_path / "a")
    found = again.lineage
    assert found.method == "lora"
    assert found.options["rank"] == 2
    assert found.recipe == "model: net\n"
    assert found.metrics == {"accuracy": 0.5, "loss": "nan"}
    assert found.seeds == {"structure": 0, "training": 3}
    assert found.parents == line.parents
    assert found.versions["torch"] == metadata.version("torch")
    assert found.created.endswith("+00:00")
    again.save(tmp_path / "b")
    assert load_equal(tmp_path / "a", tmp_path / "b")
    assert Lineage.from_json(line.as_json(), "x").as_json() == line.as_json()


def test_the_name_may_be_changed_and_a_taken_one_is_refused(saved):
    model = net()
    assert fs.load(model, saved[0]).name == "first"
    with pytest.raises(InputError, match="'first' is already there"):
        fs.load(model, saved[0])
    assert fs.load(model, saved[0], name="second").name == "second"
    assert torch.equal(model(batch()), saved[1])


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    adapter = fs.adapt(net(), LORA, TARGETS, ())
    adapter.save(tmp_path / "a")
    adapter.deltas["blocks.1.up"].B.data[3, 1] = float("inf")
    with pytest.raises(StateError, match=r"'delta/blocks.1.up/B' holds 1 of 80 values"):
        adapter.save(tmp_path / "a")
    with pytest.raises(StateError, match=r"'delta/blocks.1.up/B'"):
        adapter.export(tmp_path / "e")
    assert not (tmp_path / "e").exists()
    fs.load(net(), tmp_path / "a")


def test_sharded_away_numbers_are_not_saved(tmp_path):
    adapter = fs.adapt(net(), LORA, TARGETS, ())
    adapter.deltas["blocks.0.up"].A.data = torch.empty(0)
    with pytest.raises(StateError, match=r"'delta/blocks.0.up/A' holds no parameters"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_interrupted_replacement_is_still_read(saved):
    shutil.move(saved[0], saved[0].with_name(".a.previous"))
    model = net()
    fs.load(model, saved[0])
    assert torch.equal(model(batch()), saved[1])


def test_the_same_base_loads_without_a_word(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fs.load(net(), saved[0])
