"""The fingerprint of a base model as data, kept beside an adapter that was made for it."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakValueDictionary

import torch

from finespun.errors import FileError, nearest

_KNOWN: "WeakValueDictionary[str, Fingerprint]" = WeakValueDictionary()


@dataclass(frozen=True)
class Fingerprint:
    """`samples` maps a parameter's name to its dtype and values; `left_out` names modules that are
    not part of the base because the adapter brings its own."""

    architecture: str
    source: str
    numbers: int
    shapes: str
    left_out: tuple[str, ...]
    samples: Mapping[str, tuple[str, tuple[float, ...]]]

    def __str__(self) -> str:
        digest = hashlib.sha256(json.dumps(dict(self.samples)).encode()).hexdigest()[:8]
        source = f" {self.source!r}" if self.source else ""
        return f"{self.architecture}{source} ({self.numbers:,} parameters, samples {digest})"

    def shared(self) -> "Fingerprint":
        """The one fingerprint of this content that is in use, or this one from now on."""
        return _KNOWN.setdefault(json.dumps(self.as_json()), self)

    def as_json(self) -> dict[str, Any]:
        samples = {k: {"dtype": d, "values": list(v)} for k, (d, v) in self.samples.items()}
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**own, "left_out": list(self.left_out), "samples": samples}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> "Fingerprint":
        """Raises FileError, beginning with `where`, for keys or values that do not belong."""
        known = {f.name for f in fields(cls)}
        for key in known ^ content.keys():
            what = "is missing" if key in known else f"is unknown; {nearest(key, known)}"
            raise FileError(f"{where}: base.{key} {what}")
        try:
            samples = {
                str(k): (_dtype_name(v["dtype"]), tuple(map(_finite, v["values"])))
                for k, v in content["samples"].items()
            }
            left_out = tuple(str(n) for n in content["left_out"])
            numbers = int(content["numbers"])
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise FileError(f"{where}: base is damaged: {error!r}") from error
        texts = [str(content[k]) for k in ("architecture", "source", "shapes")]
        return cls(texts[0], texts[1], numbers, texts[2], left_out, samples)


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:80]!r} is no finite number")
    return float(value)


def _dtype_name(name: Any) -> str:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name!r} is no dtype of real numbers")
    return str(name)
