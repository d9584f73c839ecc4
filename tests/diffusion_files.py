"""Tiny diffusion models, and LoRA files of diffusers and kohya for them, made by hand."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from suite import stir
from tiny import FAMILIES, built
from torch import Tensor, nn

import finespun as fs

LAYERS = ("down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1",
          "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")  # fmt: skip


def unet() -> nn.Module:
    return built("diffusers unet")


def text(width: int = 24) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=40, hidden_size=width, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
            initializer_range=0.3,
        )  # fmt: skip
        return CLIPTextModel(config).eval()


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=12,
            axes_dims_rope=(2, 2, 4),
        ).eval()  # fmt: skip


@torch.no_grad()
def out(model: nn.Module) -> Tensor:
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    if isinstance(model, UNet2DConditionModel):
        return FAMILIES["diffusers unet"].call(model)
    g = torch.Generator().manual_seed(3)
    if isinstance(model, FluxTransformer2DModel):
        return model(
            hidden_states=torch.randn(1, 6, 4, generator=g),
            encoder_hidden_states=torch.randn(1, 3, 12, generator=g),
            pooled_projections=torch.randn(1, 12, generator=g),
            timestep=torch.tensor([0.5]), img_ids=torch.zeros(6, 3), txt_ids=torch.zeros(3, 3),
        ).sample  # fmt: skip
    return model(input_ids=torch.arange(3, 17).view(2, 7)).last_hidden_state


def shifted(model: nn.Module, updates: dict[str, Tensor]) -> nn.Module:
    """A copy with every ΔW added to the weight by hand."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, update in updates.items():
            weight = other.get_submodule(name).weight
            weight += update.view(weight.shape)
    return other


class Draw:
    """Parameters for one layer after another, the same every time."""

    def __init__(self) -> None:
        self.g = torch.Generator().manual_seed(7)

    def __call__(self, *shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=self.g)


def size_of(model: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(model.get_submodule(name).weight.shape)


def weighted(model: nn.Module) -> list[str]:
    """Names of all linear layers and convolutions."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def lora(
    model: nn.Module, names: list[str], rank: int = 3, alpha: float | None = 2.0
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Layer -> its tensors by kohya's words, and layer -> ΔW by hand."""
    draw, tensors, updates = Draw(), {}, {}
    for name in names:
        rows, *kernel = size_of(model, name)
        down = draw(rank, *kernel)
        up = draw(rows, rank, *[1] * (len(kernel) - 1))
        tensors[name] = {"lora_down.weight": down, "lora_up.weight": up}
        if alpha is not None:
            tensors[name]["alpha"] = torch.tensor(alpha)
        scale = 1.0 if alpha is None else alpha / rank
        updates[name] = scale * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
    return tensors, updates


def kohya(tensors: dict[str, dict[str, Tensor]], prefix: str = "lora_unet") -> dict[str, Tensor]:
    return {
        f"{prefix}_{name.replace('.', '_')}.{leaf}": t
        for name, own in tensors.items()
        for leaf, t in own.items()
    }


def adapted(model: nn.Module, structure: fs.Structure, names: list[str], **options) -> fs.Adapter:
    adapter = fs.adapt(model, structure, names, train_modules=(), name="mine", **options)
    stir(adapter.parameters())
    model.eval()
    return adapter


@contextmanager
def without_a_word() -> Iterator[None]:
    """Inside, neither diffusers nor PEFT nor transformers warns or logs anything above info."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not said, said


def by_diffusers(path, model: nn.Module, part: str = "unet") -> nn.Module:
    """The model with the file loaded by diffusers' own loader of pipelines."""
    from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin

    mixin = FluxLoraLoaderMixin if part == "transformer" else StableDiffusionLoraLoaderMixin
    told = {} if part != "unet" else {"unet_config": model.config}
    state, *found, metadata = mixin.lora_state_dict(
        path.parent, weight_name=path.name, return_lora_metadata=True, local_files_only=True, **told
    )
    alphas = found[0] if found else None
    if part == "unet":
        mixin.load_lora_into_unet(state, alphas, model, metadata=metadata)
    elif part == "transformer":
        mixin.load_lora_into_transformer(state, alphas, model, metadata=metadata)
    else:
        mixin.load_lora_into_text_encoder(state, alphas, model, metadata=metadata)
    return model.eval()
