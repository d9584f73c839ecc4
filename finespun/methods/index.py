"""Where every method lives; written by tests/make_index.py, not by hand."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finespun.methods.allocation.merge_inject import MergeInject as MergeInject
    from finespun.methods.dynamics.allora import ALLoRA as ALLoRA
    from finespun.methods.dynamics.ggpo import GGPO as GGPO
    from finespun.methods.dynamics.lora_fa import LoRAFA as LoRAFA
    from finespun.methods.dynamics.lora_plus import LoRAPlus as LoRAPlus
    from finespun.methods.dynamics.lora_pro import LoRAPro as LoRAPro
    from finespun.methods.dynamics.mgpo import MGPO as MGPO
    from finespun.methods.dynamics.muon import Muon as Muon
    from finespun.methods.dynamics.riemannian import Riemannian as Riemannian
    from finespun.methods.initializers.corda import CorDA as CorDA
    from finespun.methods.initializers.eva import EVA as EVA
    from finespun.methods.initializers.from_adapter import FromAdapter as FromAdapter
    from finespun.methods.initializers.loftq import LoftQ as LoftQ
    from finespun.methods.initializers.lora_ga import LoRAGA as LoRAGA
    from finespun.methods.initializers.lora_sb import LoRASB as LoRASB
    from finespun.methods.initializers.milora import MiLoRA as MiLoRA
    from finespun.methods.initializers.olora import OLoRA as OLoRA
    from finespun.methods.initializers.orthogonal import Orthogonal as Orthogonal
    from finespun.methods.initializers.pissa import PiSSA as PiSSA
    from finespun.methods.objectives.ba_lora import BALoRA as BALoRA
    from finespun.methods.objectives.glad import GLAD as GLAD
    from finespun.methods.structures.block_lora import BlockLoRA as BlockLoRA
    from finespun.methods.structures.boft import BOFT as BOFT
    from finespun.methods.structures.c3a import C3A as C3A
    from finespun.methods.structures.delora import DeLoRA as DeLoRA
    from finespun.methods.structures.dora import DoRA as DoRA
    from finespun.methods.structures.fourierft import FourierFT as FourierFT
    from finespun.methods.structures.gralora import GraLoRA as GraLoRA
    from finespun.methods.structures.hira import HiRA as HiRA
    from finespun.methods.structures.ia3 import IA3 as IA3
    from finespun.methods.structures.kadaptation import KAdaptation as KAdaptation
    from finespun.methods.structures.krona import KronA as KronA
    from finespun.methods.structures.loha import LoHa as LoHa
    from finespun.methods.structures.lokr import LoKr as LoKr
    from finespun.methods.structures.lor2c import LoR2C as LoR2C
    from finespun.methods.structures.lora import LoRA as LoRA
    from finespun.methods.structures.lora_xs import LoRAXS as LoRAXS
    from finespun.methods.structures.lsr import LSR as LSR
    from finespun.methods.structures.melora import MELoRA as MELoRA
    from finespun.methods.structures.miss import MiSS as MiSS
    from finespun.methods.structures.mora import MoRA as MoRA
    from finespun.methods.structures.nola import NOLA as NOLA
    from finespun.methods.structures.oft import OFT as OFT
    from finespun.methods.structures.randlora import RandLoRA as RandLoRA
    from finespun.methods.structures.s2_lora import S2LoRA as S2LoRA
    from finespun.methods.structures.s2ft import S2FT as S2FT
    from finespun.methods.structures.shira import SHiRA as SHiRA
    from finespun.methods.structures.tera import TeRA as TeRA
    from finespun.methods.structures.tied_lora import TiedLoRA as TiedLoRA
    from finespun.methods.structures.tokens import Tokens as Tokens
    from finespun.methods.structures.unilora import UniLoRA as UniLoRA
    from finespun.methods.structures.vblora import VBLoRA as VBLoRA
    from finespun.methods.structures.vera import VeRA as VeRA

NAMES = {
    "ALLoRA": "finespun.methods.dynamics.allora",
    "BALoRA": "finespun.methods.objectives.ba_lora",
    "BOFT": "finespun.methods.structures.boft",
    "BlockLoRA": "finespun.methods.structures.block_lora",
    "C3A": "finespun.methods.structures.c3a",
    "CorDA": "finespun.methods.initializers.corda",
    "DeLoRA": "finespun.methods.structures.delora",
    "DoRA": "finespun.methods.structures.dora",
    "EVA": "finespun.methods.initializers.eva",
    "FourierFT": "finespun.methods.structures.fourierft",
    "FromAdapter": "finespun.methods.initializers.from_adapter",
    "GGPO": "finespun.methods.dynamics.ggpo",
    "GLAD": "finespun.methods.objectives.glad",
    "GraLoRA": "finespun.methods.structures.gralora",
    "HiRA": "finespun.methods.structures.hira",
    "IA3": "finespun.methods.structures.ia3",
    "KAdaptation": "finespun.methods.structures.kadaptation",
    "KronA": "finespun.methods.structures.krona",
    "LSR": "finespun.methods.structures.lsr",
    "LoHa": "finespun.methods.structures.loha",
    "LoKr": "finespun.methods.structures.lokr",
    "LoR2C": "finespun.methods.structures.lor2c",
    "LoRA": "finespun.methods.structures.lora",
    "LoRAFA": "finespun.methods.dynamics.lora_fa",
    "LoRAGA": "finespun.methods.initializers.lora_ga",
    "LoRAPlus": "finespun.methods.dynamics.lora_plus",
    "LoRAPro": "finespun.methods.dynamics.lora_pro",
    "LoRASB": "finespun.methods.initializers.lora_sb",
    "LoRAXS": "finespun.methods.structures.lora_xs",
    "LoftQ": "finespun.methods.initializers.loftq",
    "MELoRA": "finespun.methods.structures.melora",
    "MGPO": "finespun.methods.dynamics.mgpo",
    "MergeInject": "finespun.methods.allocation.merge_inject",
    "MiLoRA": "finespun.methods.initializers.milora",
    "MiSS": "finespun.methods.structures.miss",
    "MoRA": "finespun.methods.structures.mora",
    "Muon": "finespun.methods.dynamics.muon",
    "NOLA": "finespun.methods.structures.nola",
    "OFT": "finespun.methods.structures.oft",
    "OLoRA": "finespun.methods.initializers.olora",
    "Orthogonal": "finespun.methods.initializers.orthogonal",
    "PiSSA": "finespun.methods.initializers.pissa",
    "RandLoRA": "finespun.methods.structures.randlora",
    "Riemannian": "finespun.methods.dynamics.riemannian",
    "S2FT": "finespun.methods.structures.s2ft",
    "S2LoRA": "finespun.methods.structures.s2_lora",
    "SHiRA": "finespun.methods.structures.shira",
    "TeRA": "finespun.methods.structures.tera",
    "TiedLoRA": "finespun.methods.structures.tied_lora",
    "Tokens": "finespun.methods.structures.tokens",
    "UniLoRA": "finespun.methods.structures.unilora",
    "VBLoRA": "finespun.methods.structures.vblora",
    "VeRA": "finespun.methods.structures.vera",
}
