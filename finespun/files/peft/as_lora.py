"""PEFT's methods that are read as the LoRA that they are: its factors from what is in the files.

VeRA and RandLoRA multiply frozen projections, which PEFT draws and saves on request. Uni-LoRA takes
every entry from one vector θ; where the file does not say from where, the places are drawn again.
Format: PEFT 0.21.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finespun.contract import SiteShape
from finespun.errors import FileError
from finespun.hosts import modules, sites
from finespun.methods.structures.lora import LoRA
from finespun.storage.patterns import check_pattern

Found = Mapping[str, Tensor]
Config = Mapping[str, Any]
ASK = "save it with save_indices=True"


def vera(found: Found, shared: Found, site: SiteShape, config: Config) -> tuple[Tensor, Tensor]:
    """A' = diag(d)·A, B' = diag(b)·B; a layer takes the first columns and rows of the projections
    A (r, in), B (out, r)."""
    b, d = found["vera_lambda_b"], found["vera_lambda_d"]
    A, B = shared["vera_A"], shared["vera_B"]
    return d[:, None] * A[:, : site.in_features], b[:, None] * B[: site.out_features]


def randlora(found: Found, shared: Found, site: SiteShape, config: Config) -> tuple[Tensor, Tensor]:
    """PEFT pairs the rows (rank, base) of one side with the columns (base, rank) of the other, both
    counted through, and swaps the sides where in > out."""
    short, long = sorted((site.in_features, site.out_features))
    lambda_, gamma = found["randlora_lambda"], found["randlora_gamma"]
    bases = lambda_.shape[1]
    small = shared["randlora_A"][:, :, :short] * lambda_[:, :, None] * gamma[None]
    large = shared["randlora_B"][:long, :bases] * (config["randlora_alpha"] / config["r"])
    rows, columns = small.flatten(end_dim=1), large.flatten(1)
    return (columns.T, rows.T) if site.in_features > site.out_features else (rows, columns)


def unilora(found: Found, shared: Found, site: SiteShape, config: Config) -> tuple[Tensor, Tensor]:
    """A[i, j] = scale_ij·θ[index_ij], and B likewise."""
    theta = shared["unilora_theta_d"].float()
    A, B = (
        theta[found[f"unilora_indices_{side}"].long()] * found[f"unilora_scales_{side}"].float()
        for side in "AB"
    )
    return A, B


def drawn(model: Any, config: Config, shared: Found) -> dict[str, dict[str, Tensor]]:
    """Where Uni-LoRA's entries come from: indices and scales of every layer that the config means.

    All entries of all A and B, layer by layer in the model's order, A before B, are a shuffled list
    in which each of the d parameters of θ stands ⌊D/d⌋ or ⌈D/d⌉ times, D being their count; an
    entry is its number over the root of how often that stands. NumPy's generator shuffles, from
    `proj_seed`: a NumPy with other streams would find other places.
    Raises FileError without the model itself, where the config does not give the layers, or is not
    of these tensors.
    """
    if not isinstance(model, nn.Module):
        raise FileError(f"its places depend on the model itself: fs.load(model, folder), or {ASK}")
    held = len(shared.get("unilora_theta_d", ()))
    if held != config["theta_d_length"]:
        raise FileError(f"theta_d_length is {config['theta_d_length']}, the file holds {held}")
    for key in ("layers_to_transform", "layers_pattern"):
        if config.get(key) not in (None, [], ""):
            raise FileError(f"{key} decides here which layers share the parameters; {ASK}")
    known = modules(model)
    names = [name for name in known if means(config.get("target_modules"), name)]
    if not names:
        raise FileError(f"target_modules names no layer of this model; {ASK}")
    hosts, rank = sites(model, names, LoRA()), int(config["r"])
    sizes = [(rank, h.shape.in_features, h.shape.out_features) for h in hosts.values()]
    order = _order(sum(r * (i + o) for r, i, o in sizes), config)
    roots = torch.bincount(order, minlength=config["theta_d_length"]).float().rsqrt()
    found, begin = {}, 0
    for name, (r, inner, out) in zip(hosts, sizes, strict=True):
        weight, own = known[name]._parameters.get("weight"), {}
        for side, shape in (("A", (r, inner)), ("B", (out, r))):
            index = order[begin : begin + shape[0] * shape[1]].view(shape)
            begin += index.numel()
            own[f"unilora_indices_{side}"] = index
            own[f"unilora_scales_{side}"] = roots[index]
            if weight is not None and weight.is_floating_point():  # PEFT rounds them as the layer
                own[f"unilora_scales_{side}"] = roots[index].to(weight.dtype)
        found[name] = own
    return found


def _order(total: int, config: Config) -> Tensor:
    size = int(config["theta_d_length"])
    generator = np.random.default_rng(int(config["proj_seed"]))
    places = (torch.arange(total // size * size) // max(total // size, 1)).numpy()
    if total % size:
        places = np.append(places, generator.choice(size, size=total % size, replace=False))
    generator.shuffle(places)
    return torch.from_numpy(places)


def means(targets: str | Sequence[str] | None, name: str) -> bool:
    """Whether PEFT's `targets` mean a module: an expression for the whole of its name, or a
    list of names and of their ends."""
    if isinstance(targets, str):
        check_pattern(targets, name)
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith(f".{t}") for t in targets or ())
