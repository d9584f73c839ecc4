"""Tiny random models of many families, each with inputs: built in milliseconds, nothing fetched."""

import enum
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIZE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DECODER = {**SIZE, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
PICTURE = {"image_size": 8, "patch_size": 4}


@dataclass(frozen=True)
class Tiny:
    """A family: `build` makes the model, `call` gives its main output, a float tensor."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]


def words(rows: int = 3, length: int = 7, vocabulary: int = 40) -> Tensor:
    """Token numbers (rows, length), the same every time, none of them special."""
    g = torch.Generator().manual_seed(4)
    return torch.randint(3, vocabulary, (rows, length), generator=g)


def reals(*shape: int) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def hugging(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A builder of transformers' model class `name`."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return build


def first(**inputs: Tensor) -> Callable[[nn.Module], Tensor]:
    """Call with these inputs and take the first output."""
    return lambda model: model(**inputs)[0]


def _clip(model: Any) -> Tensor:
    texts = model.get_text_features(words())
    images = model.get_image_features(reals(2, 3, 8, 8))
    pooled = [getattr(f, "pooler_output", f) for f in (texts, images)]
    return pooled[0] @ pooled[1].T


def _timm_vit() -> nn.Module:
    return timm_module("timm.models.vision_transformer").VisionTransformer(
        img_size=8, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=3
    )


def _diffusers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**options)

    return build


class _Body(nn.Module):
    """What sentence-transformers puts around a transformer: a dictionary in, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.auto_model = hugging("BertModel", "BertConfig", **SIZE)()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.auto_model(features["input_ids"], features["attention_mask"])[0]
        return {**features, "token_embeddings": hidden}


def _sentences() -> nn.Module:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    return SentenceTransformer(modules=[_Body(), Pooling(SIZE["hidden_size"])], device="cpu")


def _embed(model: nn.Module) -> Tensor:
    ids = words()
    return model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]


FAMILIES: dict[str, Tiny] = {
    "bert": Tiny(
        hugging("BertForSequenceClassification", "BertConfig", **SIZE), first(input_ids=words())
    ),
    "roberta": Tiny(
        hugging("RobertaForSequenceClassification", "RobertaConfig", **SIZE),
        first(input_ids=words()),
    ),
    "deberta": Tiny(
        hugging("DebertaV2ForSequenceClassification", "DebertaV2Config", **SIZE),
        first(input_ids=words()),
    ),
    "t5": Tiny(
        hugging(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=40,
            d_model=24,
            d_kv=12,
            d_ff=40,
            num_layers=3,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        first(input_ids=words(), decoder_input_ids=words(3, 4)),
    ),
    "gpt2": Tiny(
        hugging("GPT2LMHeadModel", "GPT2Config", vocab_size=40, n_layer=3, n_embd=24, n_head=2),
        first(input_ids=words()),
    ),
    "llama": Tiny(hugging("LlamaForCausalLM", "LlamaConfig", **DECODER), first(input_ids=words())),
    "qwen2": Tiny(hugging("Qwen2ForCausalLM", "Qwen2Config", **DECODER), first(input_ids=words())),
    "qwen3": Tiny(
        hugging("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=12),
        first(input_ids=words()),
    ),
    "mistral": Tiny(
        hugging("MistralForCausalLM", "MistralConfig", **DECODER, head_dim=12),
        first(input_ids=words()),
    ),
    "vit": Tiny(
        hugging("ViTForImageClassification", "ViTConfig", **{**SIZE, **PICTURE}),
        first(pixel_values=reals(2, 3, 8, 8)),
    ),
    "whisper": Tiny(
        hugging(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=40,
            d_model=24,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            num_mel_bins=8,
            max_source_positions=6,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        first(input_features=reals(2, 8, 12), decoder_input_ids=words(2, 4)),
    ),
    "clip": Tiny(
        hugging(
            "CLIPModel",
            "CLIPConfig",
            text_config={**SIZE, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**SIZE, **PICTURE},
            projection_dim=24,
        ),
        _clip,
    ),
    "timm vit": Tiny(_timm_vit, lambda model: model(reals(2, 3, 8, 8))),
    "diffusers dit": Tiny(
        _diffusers(
            "DiTTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            num_layers=3,
            sample_size=8,
            patch_size=4,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        ),
        first(
            hidden_states=reals(2, 4, 8, 8),
            timestep=torch.tensor([1, 2]),
            class_labels=torch.tensor([3, 4]),
        ),
    ),
    "diffusers unet": Tiny(
        _diffusers(
            "UNet2DConditionModel",
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        first(
            sample=reals(2, 4, 8, 8),
            timestep=torch.tensor([1, 2]),
            encoder_hidden_states=reals(2, 5, 12),
        ),
    ),
    "sentence transformer": Tiny(_sentences, _embed),
}


def built(family: str) -> nn.Module:
    """The family's model in eval mode, the same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[family].build().eval()


# --- timm without torchvision --------------------------------------------------------------------


class _Absent(types.ModuleType):
    """Stands for a module of torchvision: every name in it is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            kinds = "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS"
            return enum.Enum(name, kinds)
        return type(name, (), {})


def timm_module(name: str) -> Any:
    """A module of timm, with torchvision (which timm imports for its data pipelines, and which
    has no build beside every torch) stood in for where it is absent."""
    if importlib.util.find_spec("torchvision") is None:
        for part in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc", ".models",
                     ".models.feature_extraction", ".datasets"):  # fmt: skip
            full = f"torchvision{part}"
            module = _Absent(full)
            module.__spec__ = importlib.machinery.ModuleSpec(full, None)
            sys.modules[full] = module
            parent, _, leaf = full.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, module)
    return importlib.import_module(name)
