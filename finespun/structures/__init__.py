"""How ΔW is written: one file a method, pure mathematics on tensors and shapes."""

from finespun.structures.block_lora import BlockLoRA
from finespun.structures.boft import BOFT
from finespun.structures.c3a import C3A
from finespun.structures.delora import DeLoRA
from finespun.structures.delta import Bank, Bypass, Delta
from finespun.structures.dora import DoRA
from finespun.structures.fourierft import FourierFT
from finespun.structures.frozen import Frozen
from finespun.structures.gralora import GraLoRA
from finespun.structures.groups import Group, module_group
from finespun.structures.hira import HiRA
from finespun.structures.ia3 import IA3
from finespun.structures.kadaptation import KAdaptation
from finespun.structures.krona import KronA
from finespun.structures.loha import LoHa
from finespun.structures.lokr import LoKr
from finespun.structures.lor2c import LoR2C
from finespun.structures.lora import LoRA
from finespun.structures.lora_xs import LoRAXS
from finespun.structures.lsr import LSR
from finespun.structures.melora import MELoRA
from finespun.structures.miss import MiSS
from finespun.structures.mora import MoRA
from finespun.structures.nola import NOLA
from finespun.structures.oft import OFT
from finespun.structures.randlora import RandLoRA
from finespun.structures.s2_lora import S2LoRA
from finespun.structures.s2ft import S2FT
from finespun.structures.shira import SHiRA
from finespun.structures.site import Coupling, Site, SiteShape, TensorSite
from finespun.structures.structure import (
    STRUCTURES,
    Plan,
    Ranked,
    Scores,
    Structure,
    Unmeasured,
    register,
    structure,
)
from finespun.structures.tera import TeRA
from finespun.structures.tied_lora import TiedLoRA
from finespun.structures.tokens import Tokens
from finespun.structures.unilora import UniLoRA
from finespun.structures.vblora import VBLoRA
from finespun.structures.vera import VeRA

__all__ = [
    "BOFT",
    "C3A",
    "IA3",
    "LSR",
    "NOLA",
    "OFT",
    "S2FT",
    "STRUCTURES",
    "Bank",
    "BlockLoRA",
    "Bypass",
    "Coupling",
    "DeLoRA",
    "Delta",
    "DoRA",
    "FourierFT",
    "Frozen",
    "GraLoRA",
    "Group",
    "HiRA",
    "KAdaptation",
    "KronA",
    "LoHa",
    "LoKr",
    "LoR2C",
    "LoRA",
    "LoRAXS",
    "MELoRA",
    "MiSS",
    "MoRA",
    "Plan",
    "RandLoRA",
    "Ranked",
    "S2LoRA",
    "SHiRA",
    "Scores",
    "Site",
    "SiteShape",
    "Structure",
    "TeRA",
    "TensorSite",
    "TiedLoRA",
    "Tokens",
    "UniLoRA",
    "Unmeasured",
    "VBLoRA",
    "VeRA",
    "module_group",
    "register",
    "structure",
]
