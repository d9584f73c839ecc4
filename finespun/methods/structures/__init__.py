"""How ΔW is written: one file a method, pure mathematics on tensors and shapes."""

from finespun.contract.structure import STRUCTURES, structure
from finespun.methods.structures.block_lora import BlockLoRA
from finespun.methods.structures.boft import BOFT
from finespun.methods.structures.c3a import C3A
from finespun.methods.structures.delora import DeLoRA
from finespun.methods.structures.dora import DoRA
from finespun.methods.structures.fourierft import FourierFT
from finespun.methods.structures.gralora import GraLoRA
from finespun.methods.structures.hira import HiRA
from finespun.methods.structures.ia3 import IA3
from finespun.methods.structures.kadaptation import KAdaptation
from finespun.methods.structures.krona import KronA
from finespun.methods.structures.loha import LoHa
from finespun.methods.structures.lokr import LoKr
from finespun.methods.structures.lor2c import LoR2C
from finespun.methods.structures.lora import LoRA
from finespun.methods.structures.lora_xs import LoRAXS
from finespun.methods.structures.lsr import LSR
from finespun.methods.structures.melora import MELoRA
from finespun.methods.structures.miss import MiSS
from finespun.methods.structures.mora import MoRA
from finespun.methods.structures.nola import NOLA
from finespun.methods.structures.oft import OFT
from finespun.methods.structures.randlora import RandLoRA
from finespun.methods.structures.s2_lora import S2LoRA
from finespun.methods.structures.s2ft import S2FT
from finespun.methods.structures.shira import SHiRA
from finespun.methods.structures.tera import TeRA
from finespun.methods.structures.tied_lora import TiedLoRA
from finespun.methods.structures.tokens import Tokens
from finespun.methods.structures.unilora import UniLoRA
from finespun.methods.structures.vblora import VBLoRA
from finespun.methods.structures.vera import VeRA

__all__ = [
    "BOFT",
    "C3A",
    "IA3",
    "LSR",
    "NOLA",
    "OFT",
    "S2FT",
    "STRUCTURES",
    "BlockLoRA",
    "DeLoRA",
    "DoRA",
    "FourierFT",
    "GraLoRA",
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
    "RandLoRA",
    "S2LoRA",
    "SHiRA",
    "TeRA",
    "TiedLoRA",
    "Tokens",
    "UniLoRA",
    "VBLoRA",
    "VeRA",
    "structure",
]
