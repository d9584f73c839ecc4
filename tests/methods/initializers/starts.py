"""What tests of initializers share: a net, its rows, and the kinds that need no file."""

import torch
from suite import draw
from torch import nn

import finespun as fs
from finespun.contract import TensorSite
from finespun.methods.initializers.pieces.starts import Place

KINDS = ("pissa", "milora", "olora", "eva", "corda", "orthogonal", "lora_ga")
LAYERS = ["0", "2"]


def net(dtype=torch.float32):
    """24 -> 40 -> 24 -> 5, the same numbers each time."""
    sizes = ((40, 24), (24, 40), (5, 24))
    layers = [nn.Linear(i, o, dtype=dtype) for o, i in sizes]
    for seed, (layer, size) in enumerate(zip(layers, sizes)):
        layer.weight.data.copy_(draw(*size, seed=seed) / size[1] ** 0.5)
        layer.bias.data.copy_(draw(size[0], seed=10 + seed) / 10)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def rows(seed=1, dtype=torch.float32, count=16):
    return draw(count, 24, seed=seed).to(dtype), draw(count, 5, seed=seed + 50).to(dtype)


def loss(model, pair):
    return (model(pair[0]) - pair[1]).square().mean()


def adapted(model, structure, initializer, batches=None, layers=LAYERS):
    """The model with an adapter that starts so."""
    dtype = next(model.parameters()).dtype
    batches = [rows(dtype=dtype)] if batches is None else batches
    return fs.adapt(
        model, structure, layers, [], initializer=initializer, batches=batches, loss=loss
    )


class Seen:
    """What was measured, given by hand."""

    def __init__(self, gradient=None, covariance=None, mean=None):
        self.given = gradient, covariance, mean

    def gradient(self, site):
        return self.given[0]

    def covariance(self, site):
        return self.given[1]

    def mean(self, site):
        return self.given[2]


def place(W, rank=4, scale=1.0, structure=None, **seen):
    """A site in float64 with a weight, and what was measured of it."""
    site = TensorSite("layer", W)
    structure = structure or fs.LoRA(rank=rank, alpha=scale * rank)
    delta = structure.build(site, structure.plan([site])).to(W.dtype)
    return Place("layer", delta, rank, Seen(**seen), seed=0)


def cosine(X, Y):
    return float((X * Y).sum() / (X.norm() * Y.norm()))
