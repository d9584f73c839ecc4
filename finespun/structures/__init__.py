"""How ΔW is written: one file a method, pure mathematics on tensors and shapes."""

from finespun.structures.delta import Bank, Bypass, Delta
from finespun.structures.frozen import Frozen
from finespun.structures.gralora import GraLoRA
from finespun.structures.groups import Group, module_group
from finespun.structures.lora import LoRA
from finespun.structures.lora_xs import LoRAXS
from finespun.structures.lsr import LSR
from finespun.structures.nola import NOLA
from finespun.structures.site import Site, SiteShape, TensorSite
from finespun.structures.structure import (
    STRUCTURES,
    Plan,
    Ranked,
    Structure,
    register,
    structure,
)
from finespun.structures.vera import VeRA

__all__ = [
    "LSR",
    "NOLA",
    "STRUCTURES",
    "Bank",
    "Bypass",
    "Delta",
    "Frozen",
    "GraLoRA",
    "Group",
    "LoRA",
    "LoRAXS",
    "Plan",
    "Ranked",
    "Site",
    "SiteShape",
    "Structure",
    "TensorSite",
    "VeRA",
    "module_group",
    "register",
    "structure",
]
