"""A tiny model for each kind of place where an update can be, its target, and its input."""

import torch
from suite import WIDTH, batch, draw
from torch import nn


class Stand(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 1.0


class Stored(torch.Tensor):
    """A stand-in for a quantised weight: a tensor of a class of its own that dequantises."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data)

    def dequantize(self):
        return self.as_subclass(torch.Tensor).clone()


def quantised_layer():
    layer = nn.Linear(WIDTH, 40)
    layer._parameters["weight"] = Stored(layer.weight.detach())
    layer.forward = lambda x: nn.functional.linear(
        x, layer._parameters["weight"].dequantize(), layer.bias
    )
    return layer


def transposed():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(40, WIDTH)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.inner(x))


class Tied(nn.Module):
    """A table, and a head of the same weight."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.layer.weight = self.table.weight

    def forward(self, x):
        return self.layer(self.table(x))


class Only(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def numbers():
    return torch.randint(0, WIDTH, (6, 3), generator=torch.Generator().manual_seed(0))


PLACES = {
    "linear": (lambda: Only(nn.Linear(WIDTH, 40)), "layer", batch),
    "own forward": (lambda: Only(Stand(WIDTH, 40)), "layer", batch),
    "quantised": (lambda: Only(quantised_layer()), "layer", batch),
    "transposed": (lambda: Only(transposed()), "layer", batch),
    "embedding": (lambda: Only(nn.Embedding(WIDTH, 40)), "layer", numbers),
    "conv": (lambda: Only(nn.Conv1d(WIDTH, 40, 1)), "layer", lambda: draw(6, WIDTH, 3, seed=2)),
    "slice": (lambda: Only(nn.Linear(WIDTH, 3 * WIDTH)), "layer:k", batch),
    "block": (lambda: Only(Around()), "layer", batch),
    "tied": (Tied, "layer", numbers),
}


def set_gain(host, gain):
    """Let a gain scale what reaches the default adapter's parameters here; None: no longer."""
    host.slots.put("gain", "default", "test", gain)
