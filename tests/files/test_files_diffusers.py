"""LoRA files of diffusers, read, and files that hold several parts of a pipeline."""

import pytest
import torch
from diffusion_files import (
    LAYERS,
    Draw,
    adapted,
    by_diffusers,
    flux,
    kohya,
    lora,
    out,
    shifted,
    text,
    unet,
    weighted,
)
from safetensors.torch import load_file, save_file
from suite import relative
from torch import Tensor, nn

import finespun as fs
from finespun.errors import InputError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*carries no fingerprint:UserWarning"),
]


TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "linear_1", "net.2"]


def injected(model: nn.Module, **options) -> nn.Module:
    """The model with a stirred LoRA of PEFT's, as diffusers trains it."""
    import peft

    model.add_adapter(peft.LoraConfig(target_modules=TARGETS, **options))
    with torch.no_grad():
        draw = Draw()
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + draw(*parameter.shape)
            elif "lora_" in name:
                parameter.copy_(draw(*parameter.shape))
    return model.eval()


OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2, "conv1": 3},
        "alpha_pattern": {"to_q": 5, "proj_in": 1},
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_diffusers_saves_of_a_unet(tmp_path, options):
    import peft
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    theirs = injected(unet(), **options)
    theirs.save_lora_adapter(tmp_path / "one")
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        tmp_path / "many",
        unet_lora_layers=peft.get_peft_model_state_dict(theirs),
        unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )
    for folder in ("one", "many"):
        model = unet()
        adapter = fs.load(model, tmp_path / folder)
        assert adapter.name == folder
        assert relative(out(model), out(theirs)) < 1e-6
    assert relative(out(unet()), out(theirs)) > 1e-2


def old_names(tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """attn1.to_q -> attn1.processor.to_q_lora.down.weight, and other layers .lora.down.weight."""
    found = {}
    for name, own in tensors.items():
        path, _, leaf = name.removesuffix(".0").rpartition(".")
        for side in ("down", "up"):
            tensor = own[f"lora_{side}.weight"]
            if leaf.startswith("to_"):
                found[f"unet.{path}.processor.{leaf}_lora.{side}.weight"] = tensor
            else:
                found[f"unet.{name}.lora.{side}.weight"] = tensor
    return found


def test_diffusers_older_names(tmp_path):
    names = [n for n in weighted(unet()) if "attn" in n or "proj" in n]
    assert any(n.endswith("to_out.0") for n in names)
    tensors, updates = lora(unet(), names, alpha=None)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(old_names(tensors), path)
    model = unet()
    fs.load(model, path)
    assert relative(out(model), out(shifted(unet(), updates))) < 1e-6
    assert relative(out(model), out(by_diffusers(path, unet()))) < 1e-6


TEXT = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
PLAIN = {"self_attn.q_proj": "self_attn.to_q", "self_attn.out_proj": "self_attn.to_out"}


@pytest.mark.parametrize("form", ["kohya", "te1", "linear layer", "old", "today"])
def test_text_encoders(tmp_path, form):
    """Their layers lie under text_model in files, and in models of transformers before version 5"""
    names = [f"encoder.layers.{i}.{leaf}" for i in range(2) for leaf in TEXT]
    tensors, updates = lora(text(), names, alpha=2.0 if form in ("kohya", "te1") else None)
    whole = {f"text_model.{n}": own for n, own in tensors.items()}
    if form in ("kohya", "te1"):
        held = kohya(whole, "lora_te" if form == "kohya" else "lora_te1")
    else:
        held = {}
        for name, own in whole.items():
            leaf = ".".join(name.split(".")[-2:])
            middle = {"linear layer": ".lora_linear_layer.", "old": "_lora.", "today": ".lora_"}
            between, base = middle[form], name
            if form == "old" and leaf in PLAIN:
                base = name.replace(leaf, PLAIN[leaf])
            elif form == "old":
                between = ".lora_linear_layer."
            for side, letter in (("down", "A"), ("up", "B")):
                end = letter if form == "today" else side
                held[f"text_encoder.{base}{between}{end}.weight"] = own[f"lora_{side}.weight"]
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(held, path)
    model = text()
    fs.load(model, path)
    assert relative(out(model), out(shifted(text(), updates))) < 1e-6
    assert relative(out(text()), out(model)) > 1e-3
    assert relative(out(model), out(by_diffusers(path, text(), "text_encoder"))) < 1e-6


def test_a_file_for_a_pipeline_gives_every_part_its_own(tmp_path):
    """A UNet and two text encoders, of which the second is wider."""
    name = "encoder.layers.0.mlp.fc1"
    first, mine = lora(text(), [name])
    _, own = lora(text(32), [name])
    second, _ = lora(text(32), [name])
    third, updates = lora(unet(), list(LAYERS))
    held = kohya(first, "lora_te1") | kohya(second, "lora_te2") | kohya(third)
    save_file(held, tmp_path / "x.safetensors")
    for model, part, wanted in (
        (unet(), "unet", updates), (text(), "text_encoder", mine), (text(32), "text_encoder_2", own)
    ):  # fmt: skip
        with pytest.warns(UserWarning, match="nothing was taken: it is another part"):
            adapter = fs.load(model, tmp_path / "x.safetensors")
        assert adapter.deltas.keys() == wanted.keys()
        again = fs.load(model, tmp_path / "x.safetensors", name="named", part=part)
        assert again.deltas.keys() == wanted.keys()
    pipeline = nn.ModuleDict({"unet": unet(), "text_encoder": text(), "text_encoder_2": text(32)})
    adapter = fs.load(pipeline, tmp_path / "x.safetensors")
    assert len(adapter.deltas) == 5
    assert relative(out(pipeline["unet"]), out(shifted(unet(), updates))) < 1e-6
    with pytest.raises(InputError, match="has no part 'vae'; known: 'text_encoder'"):
        fs.load(text(), tmp_path / "x.safetensors", name="y", part="vae")


def test_two_parts_that_fit_are_asked_about(tmp_path):
    name = "encoder.layers.0.mlp.fc1"
    first, updates = lora(text(), [name])
    second, other = lora(text(), [name], alpha=7.0)
    save_file(kohya(first, "lora_te1") | kohya(second, "lora_te2"), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="text_encoder and text_encoder_2 fit this model; say"):
        fs.load(text(), tmp_path / "x.safetensors")
    for part, wanted in (("text_encoder", updates), ("text_encoder_2", other)):
        model = text()
        fs.load(model, tmp_path / "x.safetensors", part=part)
        assert relative(out(model), out(shifted(text(), wanted))) < 1e-6
    adapted(text(), fs.LoRA(rank=2), [name]).save(tmp_path / "own")
    with pytest.raises(InputError, match="has no parts such as 'unet'"):
        fs.load(text(), tmp_path / "own", part="unet")


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_transformer(tmp_path, form):
    names = [n for n in weighted(flux()) if "attn" in n or "ff" in n or "proj" in n]
    tensors, updates = lora(flux(), names, alpha=2.0 if form == "kohya" else None)
    if form == "kohya":
        held = kohya(tensors, "lora_transformer")
    else:
        held = {
            f"transformer.{n}.{leaf.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}": t
            for n, own in tensors.items()
            for leaf, t in own.items()
        }
    path = tmp_path / "x.safetensors"
    save_file(held, path)
    model = flux()
    fs.load(model, path)
    assert relative(out(model), out(shifted(flux(), updates))) < 1e-6
    assert relative(out(flux()), out(model)) > 1e-3
    if form == "diffusers":
        assert relative(out(model), out(by_diffusers(path, flux(), "transformer"))) < 1e-6


@pytest.mark.parametrize("told", [True, False], ids=["metadata", "keys alone"])
def test_dora_of_diffusers(tmp_path, told):
    theirs = injected(unet(), r=2, lora_alpha=4 if told else 2, use_dora=True)
    theirs.save_lora_adapter(tmp_path / "x")
    path = tmp_path / "x" / "pytorch_lora_weights.safetensors"
    if not told:
        save_file(load_file(path), path)
    model = unet()
    adapter = fs.load(model, tmp_path / "x")
    assert adapter.structure.kind == "dora"
    assert relative(out(model), out(theirs)) < 1e-6
