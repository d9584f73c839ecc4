"""What every test shares: one thread, a fixed seed, and a registry that no test can change."""

import pytest
import torch
from hypothesis import settings

from finespun.methods.structures import STRUCTURES

torch.set_num_threads(1)
settings.register_profile("finespun", deadline=None)  # time depends on what else runs
settings.load_profile("finespun")


@pytest.fixture(autouse=True)
def same_start():
    """Every test draws the same numbers and leaves the registry of structures as it was."""
    torch.manual_seed(0)
    known = dict(STRUCTURES)
    yield
    STRUCTURES.clear()
    STRUCTURES.update(known)
