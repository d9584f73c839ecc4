"""Sums over all ranks of a distributed run, wherever they are kept."""

import torch
import torch.distributed as dist
from torch import Tensor


def reduced(total: Tensor, device: torch.device) -> Tensor:
    """The sum of `total` over all ranks; itself where there is one. It travels by `device` where
    the backend cannot reach where it lies."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return total
    there = total if dist.get_backend() == "gloo" else total.to(device)
    there = there.cpu() if dist.get_backend() == "gloo" else there
    dist.all_reduce(there)
    return there.to(total.device)
