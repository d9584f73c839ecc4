"""Checkpoints restore a run exactly, and survive a kill at any moment."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from finespun.errors import FileError, InputError
from finespun.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)


def same(a, b):
    """Whether two states are equal to the bit, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


DTYPES = [getattr(torch, n) for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)]
DTYPES = [d for d in dict.fromkeys(DTYPES) if not str(d).startswith(("torch.q", "torch.bits"))]
DTYPES = [d for d in DTYPES if d.itemsize and str(d).rpartition("t")[2] not in "1234567"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_every_dtype_comes_back_to_the_bit(tmp_path, dtype, shape):
    count = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,)).to(torch.uint8)
    state = {"step": 1, "x": raw.view(dtype).reshape(shape)}
    save_checkpoint(tmp_path, state)
    assert same(load_checkpoint(tmp_path), state)


KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text()) | st.booleans() | st.none()
ARRAYS = st.sampled_from(
    [
        np.arange(6.0).reshape(2, 3)[:, ::2],
        np.zeros((0, 2), np.int16),
        np.float32(0.1),
        np.array(3 + 1j),
        np.arange(3, dtype=np.uint64),
        np.bool_(True),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | ARRAYS
LEAVES |= st.builds(lambda n: torch.arange(n).float(), st.integers(0, 3))
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(st.sampled_from(["$tensor", "$dict", "__metadata__", "a/b"]), inner)
    ),
    max_leaves=20,
)


@given(extra=STATES)
def test_any_nested_state_comes_back_exactly(tmp_path_factory, extra):
    folder = tmp_path_factory.mktemp("run")
    state = {"step": 0, "extra": extra}
    save_checkpoint(folder, state)
    assert same(load_checkpoint(folder), state)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam([{"params": p[:1], "lr": 0.5}, {"params": p[1:]}]),
        lambda p: torch.optim.LBFGS(p, max_iter=2),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.NAdam(p),
    ],
)
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path, make):
    def build():
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 1))
        optimizer = make(list(model.parameters()))
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def train(model, optimizer, scheduler, steps):
        for _ in range(steps):
            x = torch.randn(5, 4) + random.random() + np.random.rand()

            def closure(x=x):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            scheduler.step()

    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, 3)
    state = {
        "step": 3,
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": random_state(),
    }
    save_checkpoint(tmp_path, state)
    train(model, optimizer, scheduler, 4)
    other, again, schedule = build()
    random.seed(1)
    found = load_checkpoint(tmp_path)
    other.load_state_dict(found["model"])
    again.load_state_dict(found["optimizer"])
    schedule.load_state_dict(found["scheduler"])
    set_random_state(found["random"])
    train(other, again, schedule, 4)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(again.state_dict(), optimizer.state_dict())


def test_the_random_state_repeats_every_generator():
    before = random_state()
    drawn = random.random(), np.random.rand(), torch.rand(2).tolist()
    random.random()
    set_random_state(before)
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == drawn


def test_the_last_few_are_kept(tmp_path):
    for step in (5, 10, 100, 1_000_000_000, 2_000_000_000):
        save_checkpoint(tmp_path, {"step": step, "x": torch.tensor([float(step)])}, keep=3)
    steps = [load_checkpoint(tmp_path, int(p.name[5:]))["step"] for p in checkpoints(tmp_path)]
    assert steps == [100, 1_000_000_000, 2_000_000_000]
    assert load_checkpoint(tmp_path)["step"] == 2_000_000_000
    assert sorted(p.name for p in tmp_path.iterdir())[0].startswith("step-")


def test_a_step_that_is_repeated_replaces_its_checkpoint(tmp_path):
    save_checkpoint(tmp_path, {"step": 1, "x": 1})
    save_checkpoint(tmp_path, {"step": 2, "x": 1})
    place = save_checkpoint(tmp_path, {"step": 1, "x": 2}, keep=1)
    assert load_checkpoint(tmp_path, 1)["x"] == 2
    assert place.exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "must be a whole number"),
        ({"step": -1}, "must be a whole number"),
        ({"step": True}, "must be a whole number"),
        ({"step": 1, "a": {"b": [print]}}, "state/a/b/0 is a builtin_function_or_method"),
        ({"step": 1, "a": np.array(["x"])}, "state/a is an array of <U1"),
        ({"step": 1, "a": np.array([None])}, "state/a is an array of object"),
        ({"step": 1, "a": torch.ones(2, device="meta")}, "state/a"),
        ({"step": 1, "a": {1, 2}}, "state/a is a set"),
    ],
)
def test_what_would_need_pickling_is_refused_by_name(tmp_path, state, message):
    save_checkpoint(tmp_path, {"step": 0})
    with pytest.raises(InputError, match=message):
        save_checkpoint(tmp_path, state)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000000"]


def test_a_state_nested_without_end_is_refused(tmp_path):
    state = {"step": 1}
    state["me"] = state
    with pytest.raises(InputError, match="nested too deeply"):
        save_checkpoint(tmp_path, state)
    deep = 0
    for _ in range(70):
        deep = [deep]
    with pytest.raises(InputError, match="nested too deeply"):
        save_checkpoint(tmp_path, {"step": 1, "deep": deep})


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="keep=0"):
        save_checkpoint(tmp_path, {"step": 1}, keep=0)


def test_nothing_to_load_is_said(tmp_path):
    with pytest.raises(FileError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "none")
    save_checkpoint(tmp_path, {"step": 4})
    with pytest.raises(FileError, match=r"no checkpoint of step 5; there are \[4\]"):
        load_checkpoint(tmp_path, 5)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_noticed_and_the_one_before_is_named(tmp_path, name, damage):
    save_checkpoint(tmp_path, {"step": 1, "x": torch.arange(9.0)})
    path = save_checkpoint(tmp_path, {"step": 2, "x": torch.arange(9.0)}) / name
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-3])
    elif damage == "flip":
        data[len(data) // 2] ^= 0x11
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(FileError, match="the one before is step=1"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, 1)["step"] == 1


@pytest.mark.parametrize(
    "tree",
    [
        '{"$tensor": "none"}', '{"$tensor": "x", "dtype": "Tensor", "shape": [1]}', '{"$what": 1}',
        '{"$array": "x", "dtype": "O", "shape": [1], "scalar": false}', '{"$dict": [[[], 1]]}',
        '{"$array": "x"}', '{"$float": []}', "[]", '{"$tensor": ["x"]}',
        '{"$tensor": "x", "dtype": "float32", "shape": [1000000]}',
    ],
)  # fmt: skip
def test_a_hostile_tree_is_refused(tmp_path, tree):
    place = save_checkpoint(tmp_path, {"step": 1, "x": torch.zeros(4, dtype=torch.uint8)})
    text = (place / "state.json").read_text()
    start = text.index('"state"')
    (place / "state.json").write_text(text[:start] + f'"state": {tree}}}')
    with pytest.raises(FileError, match=r"state.json is damaged"):
        load_checkpoint(tmp_path)


def test_a_format_of_the_future_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, {"step": 1}) / "state.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(FileError, match="has format 2; this version reads 1"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_between_two_renames_is_found(tmp_path):
    place = save_checkpoint(tmp_path, {"step": 7, "x": 1})
    place.rename(tmp_path / ".step-000000007.previous")
    assert load_checkpoint(tmp_path)["x"] == 1
    save_checkpoint(tmp_path, {"step": 7, "x": 2})
    assert load_checkpoint(tmp_path)["x"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000007"]


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Step n holds n everywhere; a child saves without pause, every step twice, and is killed."""

    def state(step):
        return {"step": step, "rows": {i: torch.full((50,), float(step)) for i in range(8)}}

    save_checkpoint(tmp_path, state(0))
    draw, last = random.Random(0), 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            for step in range(last + 1, last + 10_000):
                save_checkpoint(tmp_path, state(step - step % 2))
            os._exit(0)
        while checkpoints(tmp_path)[-1].name <= f"step-{last:09d}":
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = load_checkpoint(tmp_path)
        assert same(found, state(found["step"]))
        assert found["step"] > last
        last = found["step"]
    save_checkpoint(tmp_path, state(last + 2))
    assert len(list(tmp_path.iterdir())) == 2
