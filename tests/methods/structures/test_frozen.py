"""Frozen random numbers: one object a key, one tensor a device, nothing in copies and pickles."""

import copy
import gc
import pickle

import pytest
import torch

from finespun.linalg import streams
from finespun.methods.structures.pieces.frozen import Frozen

KEY = (3, ("site", "test"), (4, 5))


def test_equal_keys_are_one_object_for_as_long_as_it_is_held():
    one = Frozen("normal", *KEY)
    assert Frozen("normal", *KEY) is one
    assert Frozen("normal", 4, *KEY[1:]) is not one
    assert one.on() is one.on(torch.device("cpu"))
    memory = one.on().data_ptr()
    assert copy.deepcopy(one).on().data_ptr() == memory
    del one
    gc.collect()
    assert not Frozen("normal", *KEY).held


@pytest.mark.parametrize("law", ["normal", "uniform", "symmetric"])
def test_the_laws_are_those_of_the_streams(law):
    frozen, key = Frozen(law, *KEY), streams.key(3, "site", "test")
    uniform = streams.uniform(key, (4, 5))
    laws = {"normal": streams.normal(key, (4, 5)), "uniform": uniform, "symmetric": 2 * uniform - 1}
    assert torch.equal(frozen.on(), laws[law])
    assert frozen.shape == (4, 5)
    assert frozen.like(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_a_pickle_holds_the_key_only():
    frozen = Frozen("normal", 3, ("site", "test"), (100, 100))
    frozen.on()
    assert len(pickle.dumps(frozen)) < 200
    assert pickle.loads(pickle.dumps(frozen)) is frozen


def test_numbers_drawn_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        drawn = Frozen("normal", 9, ("site", "inference"), (4, 5)).on()
    assert not drawn.is_inference()


def test_compilation_reads_numbers_that_nobody_read_before():
    frozen, x = Frozen("uniform", 8, ("site", "compiled"), (4, 5)), torch.ones(5)
    compiled = torch.compile(lambda x: frozen.like(x) @ x, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), frozen.on() @ x)
