"""LoRA files of kohya's scripts, read: against ΔW by hand and against diffusers."""

import pytest
import torch
from diffusion_files import (
    LAYERS,
    Draw,
    by_diffusers,
    kohya,
    lora,
    out,
    shifted,
    size_of,
    unet,
    weighted,
)
from safetensors.torch import save_file
from suite import relative
from torch import nn

import finespun as fs
from finespun.files.detect import read_adapter
from finespun.files.diffusion.names import layers_of, place_on

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*carries no fingerprint:UserWarning"),
]


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
    assert sorted(s.name for s in saved.state.plan.sites) == sorted(SDXL.values())


def test_first_names_are_those_that_diffusers_converts(tmp_path):
    """The file in the first implementation's names, converted by diffusers itself: there a layer of
    the up blocks' samplers is not found where a block has no attention, which is left out here."""
    from finespun.files.diffusion.names import _first_names

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
    import peft

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
