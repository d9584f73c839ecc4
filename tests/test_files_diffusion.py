"""LoRA files of diffusers and kohya's scripts, read: against ΔW by hand and against diffusers."""

import peft
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusion_files import (
    Draw,
    adapted,
    by_diffusers,
    flux,
    kohya,
    lora,
    out,
    shifted,
    size_of,
    text,
    unet,
    weighted,
)
from safetensors.torch import load_file, save_file
from suite import relative
from torch import Tensor, nn

import finespun as fs
from finespun.errors import InputError
from finespun.files.diffusion_names import layers_of, place_on
from finespun.files.reading import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*carries no fingerprint:UserWarning")


# --- kohya's files, in ------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [2.0, None], ids=["alpha", "no alpha"])
def test_a_kohya_file_acts_on_every_layer_of_a_unet(tmp_path, alpha):
    tensors, updates = lora(unet(), weighted(unet()), alpha=alpha)
    path = tmp_path / "style.safetensors"
    save_file(kohya(tensors), path)
    model = unet()
    adapter = fs.load(model, path)
    assert adapter.name == "style"
    assert adapter.deltas.keys() == updates.keys()
    for name, delta in adapter.deltas.items():
        assert relative(delta.dense(delta.base_weight()), updates[name]) < 1e-6
    assert relative(out(model), out(shifted(unet(), updates))) < 1e-6
    assert relative(out(unet()), out(model)) > 1e-2
    theirs = by_diffusers(path, unet())
    assert relative(out(model), out(theirs)) < 1e-6


class Wide(nn.Module):
    """The names that layers of SDXL's UNet have, at their places, each 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        names = "conv_in conv_out time_embedding.linear_1 time_embedding.linear_2 "
        names += "add_embedding.linear_1 add_embedding.linear_2 "
        for side, attended, resnets in (("down", (1, 2), 2), ("up", (0, 1), 3)):
            for i in range(3):
                for j in range(resnets):
                    block = f"{side}_blocks.{i}"
                    names += f"{block}.resnets.{j}.conv1 {block}.resnets.{j}.conv2 "
                    names += f"{block}.resnets.{j}.time_emb_proj "
                    names += f"{block}.resnets.{j}.conv_shortcut "
                    if i in attended:
                        names += f"{block}.attentions.{j}.proj_in "
                        names += f"{block}.attentions.{j}.transformer_blocks.1.ff.net.0.proj "
                if i < 2:
                    names += f"{side}_blocks.{i}.{side}samplers.0.conv "
        names += "mid_block.resnets.0.conv1 mid_block.resnets.1.conv2 "
        names += "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0"
        for name in names.split():
            self.put(name.split("."))

    def put(self, parts: list[str]) -> None:
        place = self
        for part in parts[:-1]:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]
        place.add_module(parts[-1], nn.Linear(2, 2))


# kohya's name of SDXL's layers, in the blocks of the first implementation -> diffusers' name
SDXL = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_5_1_transformer_blocks_1_ff_net_0_proj":
        "down_blocks.1.attentions.1.transformer_blocks.1.ff.net.0.proj",
    "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
    "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
    "middle_block_1_transformer_blocks_9_attn2_to_out_0":
        "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_1_proj_in": "up_blocks.0.attentions.0.proj_in",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_4_0_out_layers_3": "up_blocks.1.resnets.1.conv2",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
}  # fmt: skip


def test_kohyas_names_for_sdxl_mean_diffusers_layers(tmp_path):
    draw = Draw()
    own = {n: {"lora_down.weight": draw(1, 2), "lora_up.weight": draw(2, 1)} for n in SDXL}
    save_file(kohya(own), tmp_path / "x.safetensors")
    saved = place_on(read_adapter(tmp_path / "x.safetensors"), layers_of(Wide()))
    assert sorted(s.name for s in saved.entry.plan.sites) == sorted(SDXL.values())


def test_first_names_are_those_that_diffusers_converts(tmp_path):
    """The file in the first implementation's names, converted by diffusers itself: there a layer of
    the up blocks' samplers is not found where a block has no attention, which is left out here."""
    from finespun.files.diffusion_names import _first_names

    names = [n for n in weighted(unet()) if "upsamplers" not in n]
    first = _first_names(weighted(unet()))
    tensors, updates = lora(unet(), names)
    save_file(kohya({first[n]: t for n, t in tensors.items()}), tmp_path / "x.safetensors")
    model = unet()
    fs.load(model, tmp_path / "x.safetensors")
    assert relative(out(model), out(shifted(unet(), updates))) < 1e-6
    theirs = by_diffusers(tmp_path / "x.safetensors", unet())
    assert relative(out(model), out(theirs)) < 1e-6


def test_a_middle_makes_an_exact_lora(tmp_path):
    """LoCon's Tucker form: ΔW[o, i, k] = α/r Σ up[o, p] mid[p, q, k] down[q, i]."""
    name, draw = "down_blocks.0.resnets.0.conv1", Draw()
    rows, columns, *k = size_of(unet(), name)
    down, mid, up = draw(3, columns, 1, 1), draw(3, 3, *k), draw(rows, 3, 1, 1)
    own = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    save_file(kohya({name: {**own, "alpha": torch.tensor(6.0)}}), tmp_path / "x.safetensors")
    model = unet()
    fs.load(model, tmp_path / "x.safetensors")
    update = 2 * torch.einsum("opxy,pqkl,qixy->oikl", up, mid, down)
    assert relative(out(model), out(shifted(unet(), {name: update}))) < 1e-6


LAYERS = ("down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1",
          "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")  # fmt: skip


@pytest.mark.parametrize("core", [False, True], ids=["flat", "core"])
def test_loha_files(tmp_path, core):
    draw, tensors, updates, r = Draw(), {}, {}, 2
    for name in LAYERS:
        rows, columns, *k = size_of(unet(), name)
        own, halves = {"alpha": torch.tensor(3.0)}, []
        for s in "12":
            if core and len(k):
                t, a, b = draw(r, r, *k), draw(r, rows), draw(r, columns)
                own[f"hada_t{s}"] = t
                halves.append(torch.einsum("ijkl,jr,ip->prkl", t, b, a).flatten(1))
            else:
                width = columns * torch.Size(k).numel()
                a, b = draw(rows, r), draw(r, width)
                halves.append(a @ b)
            own |= {f"hada_w{s}_a": a, f"hada_w{s}_b": b}
        tensors[name], updates[name] = own, 3 / r * halves[0] * halves[1]
    save_file(kohya(tensors), tmp_path / "x.safetensors")
    model = unet()
    adapter = fs.load(model, tmp_path / "x.safetensors")
    assert adapter.structure.kind == "loha"
    assert relative(out(model), out(shifted(unet(), updates))) < 1e-6
    assert relative(out(unet()), out(model)) > 1e-5


@pytest.mark.parametrize("form", ["low", "whole", "both", "core", "mixed"])
def test_lokr_files(tmp_path, form):
    draw, tensors, updates, r = Draw(), {}, {}, 1
    for number, name in enumerate(LAYERS):
        rows, columns, *k = size_of(unet(), name)
        u, v, many = 2, (rows // 2, columns // 2), torch.Size(k).numel()
        P = draw(u, 2)
        own = {"alpha": torch.tensor(0.5), "lokr_w1": P}
        whole = form == "whole" or (form == "mixed" and number)
        if form == "both":
            a, b = draw(u, r), draw(r, 2)
            own |= {"lokr_w1_a": a, "lokr_w1_b": b}
            del own["lokr_w1"]
            P = a @ b
        if whole:
            Q = own["lokr_w2"] = draw(*v, *k)
        elif form == "core" and k:
            t, a, b = draw(r, r, *k), draw(r, v[0]), draw(r, v[1])
            own |= {"lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}
            Q = torch.einsum("ijkl,ip,jr->prkl", t, a, b)
        else:
            a, b = draw(v[0], r), draw(r, v[1] * many)
            own |= {"lokr_w2_a": a, "lokr_w2_b": b}
            Q = a @ b
        scale = 1.0 if whole else 0.5 / r
        tensors[name], updates[name] = (
            own,
            scale * torch.kron(P, Q.reshape(len(Q), -1).contiguous()),
        )
    save_file(kohya(tensors), tmp_path / "x.safetensors")
    model = unet()
    adapter = fs.load(model, tmp_path / "x.safetensors")
    assert adapter.structure.kind == "lokr"
    assert relative(out(model), out(shifted(unet(), updates))) < 1e-6
    assert relative(out(unet()), out(model)) > 1e-5


@pytest.mark.parametrize(("kind", "alpha"), [("loha", 3), ("lokr", 2)])
def test_pefts_own_numbers_of_loha_and_lokr_give_pefts_own_updates(tmp_path, kind, alpha):
    """Where neither of LoKr's factors is low, alpha / r acts in PEFT and not in kohya's files: so
    it is 1 there."""
    make = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind]
    config = make(
        r=2, alpha=alpha, target_modules=list(LAYERS), use_effective_conv2d=True,
        init_weights=False,
    )  # fmt: skip
    theirs = peft.inject_adapter_in_model(config, unet()).eval()
    held = peft.get_peft_model_state_dict(theirs)
    found = {}
    for key, tensor in held.items():
        name = key.rpartition(".")[0]
        found[f"lora_unet_{name.replace('.', '_')}.{key.rpartition('.')[2]}"] = tensor.contiguous()
        found[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(float(alpha))
    save_file(found, tmp_path / "x.safetensors")
    model = unet()
    adapter = fs.load(model, tmp_path / "x.safetensors")
    for name, delta in adapter.deltas.items():
        wanted = theirs.get_submodule(name).get_delta_weight("default").flatten(1)
        assert relative(delta.dense(delta.base_weight()), wanted) < 1e-6
    assert relative(out(model), out(theirs)) < 1e-6


# --- diffusers' files, in -----------------------------------------------------------------------
TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "linear_1", "net.2"]


def injected(model: nn.Module, **options) -> nn.Module:
    """The model with a stirred LoRA of PEFT's, as diffusers trains it."""
    model.add_adapter(peft.LoraConfig(target_modules=TARGETS, **options))
    with torch.no_grad():
        draw = Draw()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
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
