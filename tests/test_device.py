"""What a device must not change: drawn numbers, outputs and gradients are those of the CPU.

FINESPUN_DEVICE names the device; tests/gpu.py runs this and the shared suite on a GPU.
"""

import time
from itertools import pairwise

import pytest
import torch
from suite import (
    CASES,
    DEVICE,
    FEW,
    adapted,
    batch,
    draw,
    every,
    net,
    one_of_each_kind,
    relative,
    stirred,
    twin,
)
from tiny_run import held_by_a_run, write_recipe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import finespun as fs
from finespun.driver import adamw, param_groups
from finespun.kernels.lowrank import low_rank_linear
from finespun.methods.structures.pieces.frozen import DRAWS, Frozen
from finespun.recipes.recipe import Recipe
from finespun.training.estimate import estimate, steps_time
from finespun.training.run import prepare, run, surroundings

CPU = torch.device("cpu")
NEED_NUMBERS = {"shira-magnitude": "its mask", "shira-structured": "torch's sparse product"}
MOVES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class OneDevice(TorchDispatchMode):
    """An operation on tensors of two devices is an error, unless it moves one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim()}
        assert func.overloadpacket in MOVES or len(devices) < 2, (func, devices)
        return func(*args, **(kwargs or {}))


def ours(case):
    """Whether the structure is the package's own, not one of the tests'."""
    return type(case.structure).__module__.startswith("finespun.")


def from_the_weights(case):
    """Whether numbers come from a decomposition, whose signs no device promises."""
    return case.structure.kind == "lora_xs"


@pytest.mark.parametrize("law", ["normal", "uniform", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_numbers_are_the_same_on_every_device_and_in_every_dtype(law, dtype):
    frozen = Frozen(law, 7, ("layer", "test"), (3, 50))
    here = DRAWS[law](fs.linalg.streams.key(7, "layer", "test"), (3, 50))
    assert torch.equal(frozen.on(DEVICE).cpu(), here)
    found = frozen.like(torch.zeros(1, dtype=dtype, device=DEVICE))
    assert found.device.type == DEVICE.type
    assert torch.equal(found.cpu(), here.to(dtype))


@every(lambda case: not from_the_weights(case))
def test_a_start_is_the_same_on_every_device(case):
    tensors = []
    for device in (CPU, DEVICE):
        _, adapter = adapted(case, net().to(device), ("head",))
        tensors.append(adapter.attached.tensors())
    assert tensors[0].keys() == tensors[1].keys()
    for name, here in tensors[0].items():
        there = tensors[1][name].cpu()
        if here.is_floating_point():
            torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(there, here), name


@every(lambda case: ours(case) and case.name not in NEED_NUMBERS)
def test_no_structure_mixes_devices(case):
    """On the device without parameters, which every machine has: whatever is made beside the layer
    must be made where the layer is."""
    model, x = net().to("meta"), torch.empty(6, 3, 24, device="meta")
    with OneDevice():
        adapter = adapted(case, model, ("head",))[1]
        for training in (True, False):
            model.train(training)(x).sum().backward()
        if case.delta().mergeable:
            adapter.merge()
            model(x)
            adapter.unmerge()
    for p in adapter.parameters():
        assert p.is_meta
        assert p.grad is not None


@every()
def test_a_model_computes_what_its_copy_on_the_cpu_computes(case):
    model, adapter = stirred(case, net(), ("head",))
    copied = twin(model).to(CPU)
    other, x = fs.Adapter(copied, "default"), batch()
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    found = []
    for one, mine, given in ((model, adapter, x), (copied, other, x.cpu())):
        y = one(given)
        goal = draw(6, 5, seed=9).to(y.device)
        gradients = torch.autograd.grad((y * goal).sum(), mine.parameters())
        found.append([y, *gradients])
    for there, here in zip(*found, strict=True):
        assert relative(there.cpu(), here) < 1e-4
    with torch.no_grad():
        assert relative(copied.to(DEVICE)(x), model(x)) < 1e-6


@one_of_each_kind(ours)
def test_files_written_on_a_device_are_those_of_the_cpu(case, tmp_path):
    model, adapter = stirred(case, net(), ("head",))
    adapter.save(tmp_path / "there")
    fs.Adapter(twin(model).to(CPU), "default").save(tmp_path / "here")
    written = [(tmp_path / at / "adapter.safetensors").read_bytes() for at in ("there", "here")]
    assert written[0] == written[1]
    loaded = net()
    fs.load(loaded, tmp_path / "here")
    assert relative(loaded(batch()), model(batch())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every(lambda case: case.kind in FEW)
def test_low_precision_is_near_and_its_gradients_are_finite(case, dtype):
    model, adapter = stirred(case, net())
    wanted = model(batch())
    with torch.autocast(DEVICE.type, dtype=dtype):
        assert relative(model(batch()), wanted) < 5e-2
    half = model.to(dtype)(batch(dtype=dtype))
    assert half.dtype == dtype
    assert relative(half, wanted) < 5e-2
    half.float().square().sum().backward()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


def test_dropout_draws_its_mask_on_the_device():
    x, W = torch.ones(400, 30, device=DEVICE), torch.zeros(30, 30, device=DEVICE)
    A = torch.eye(30, device=DEVICE)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(low_rank_linear(x, W, None, A, A, 1.0, drop=0.25))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((drawn[0] == 0).double().mean()) == pytest.approx(0.25, abs=0.02)


def test_the_fused_optimiser_takes_the_steps_of_the_cpu():
    case = next(case for case in CASES if case.name == "lsr")
    curves = []
    for device in (CPU, DEVICE):
        model, adapter = adapted(case, net().to(device), ("head",))
        optimizer = adamw(param_groups(adapter.parameters(), (), 1e-2, 0.01), 1e-2)
        assert all(group["fused"] for group in optimizer.param_groups)
        x, goal = batch().to(device), draw(6, 5, seed=9).to(device)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = (model(x) - goal).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert all(later < earlier for earlier, later in pairwise(curves[1]))


# --- runs ----------------------------------------------------------------------------------------
def test_a_run_repeats_bit_for_bit(tmp_path):
    file = write_recipe(tmp_path, device=str(DEVICE))
    found = []
    for name in ("one", "two"):
        result = run(Recipe.load(file, [f"output={tmp_path / name}"]))
        found.append((result.after, result.loss, (tmp_path / name / "adapter.safetensors")))
    assert found[0][:2] == found[1][:2]
    assert found[0][2].read_bytes() == found[1][2].read_bytes()


def test_an_estimate_waits_for_a_gpu(tmp_path, monkeypatch):
    """Without one too: the device is only named, and its waiting written down."""
    recipe, events = Recipe.load(write_recipe(tmp_path)), []
    with surroundings(recipe):
        job = prepare(recipe)
        loop = job.loop()
    monkeypatch.setattr(loop, "device", torch.device("cuda"))
    monkeypatch.setattr(loop, "take", lambda group: events.append("step"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("waited"))
    assert steps_time(job, loop, [[0, 1], [2, 3]], time.perf_counter, whole=True) > 0
    assert events == ["step", "waited"] * (len(events) // 2) != []


@pytest.mark.slow
def test_a_real_run_holds_the_memory_that_was_estimated(tmp_path):
    """By torch's own count on the device; a GPU's has what matrix products reserve in it, so the
    bound is wider than that of test_estimate.py."""
    text = "model: minilm-l3\ndata: {builtin: trec, train_rows: 64}\ntargets: [query, value]\n"
    training = f"training: {{batch_size: 32, max_length: 64, epochs: 1, device: {DEVICE}}}"
    recipe = Recipe.parse(text + training)
    found = estimate(recipe)
    if DEVICE.type == "cpu":
        ratio = (found.activations + found.optimiser) / held_by_a_run(recipe)
    else:
        with surroundings(recipe):
            loop = prepare(recipe).loop()
            torch.cuda.reset_peak_memory_stats(DEVICE)
            loop.run()
        ratio = found.memory / torch.cuda.max_memory_allocated(DEVICE)
    assert 0.5 < ratio < 2
