"""LoRA files of diffusers and kohya's scripts, written by us."""

import pytest
import torch
from diffusion_files import (
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
    without_a_word,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from suite import relative
from torch import nn

import finespun as fs
from finespun.cli.app import run
from finespun.errors import BaseMismatch, InputError
from finespun.files import read_adapter
from finespun.lifecycle.conversion import convert

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*carries no fingerprint:UserWarning"),
]
WEIGHTS = "pytorch_lora_weights.safetensors"
SOME = ["conv_in", "mid_block.resnets.0.conv1", "up_blocks.1.attentions.0.proj_in",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]  # fmt: skip


# --- written by us, read by diffusers -----------------------------------------------------------
@pytest.mark.parametrize(
    "structure",
    [fs.LoRA(rank=3, alpha=7.0), fs.LSR(rank=4, separation_rank=2), fs.make("loha", rank=1)],
    ids=["lora", "lsr", "loha"],
)
def test_diffusers_computes_what_we_do(tmp_path, structure):
    model = unet()
    names = weighted(model) if structure.kind == "lora" else SOME[1:]
    adapter = adapted(model, structure, names)
    adapter.scale = 0.7
    wanted = out(model)
    done = adapter.export(tmp_path / "x", format="diffusers")
    assert done.error == 0
    assert done.folder == tmp_path / "x" / WEIGHTS
    with without_a_word():
        whole = by_diffusers(tmp_path / "x" / WEIGHTS, unet())
        one = unet()
        one.load_lora_adapter(tmp_path / "x" / WEIGHTS, prefix="unet")
    for theirs in (whole, one.eval()):
        assert relative(out(theirs), wanted) < 1e-6
    assert relative(out(unet()), wanted) > 1e-3
    again = unet()
    assert fs.load(again, tmp_path / "x").name == "mine"
    assert relative(out(again), wanted) < 1e-6


def test_a_file_of_ours_converted_from_kohyas_names_by_diffusers(tmp_path):
    model = unet()
    adapter = adapted(model, fs.LoRA(rank=3, alpha=7.0), weighted(model))
    adapter.scale = -0.5
    path = tmp_path / "x.safetensors"
    assert adapter.export(path, format="kohya").folder == path
    held = load_file(path)
    assert {k.split(".", 1)[1] for k in held} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(k.startswith("lora_unet_") for k in held)
    with without_a_word():
        theirs = by_diffusers(path, unet())
    assert relative(out(theirs), out(model)) < 1e-6
    again = unet()
    fs.load(again, path)
    assert relative(out(again), out(model)) < 1e-6


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize("which", ["text_encoder", "transformer"])
def test_other_parts_of_a_pipeline(tmp_path, style, which):
    make = {"text_encoder": text, "transformer": flux}[which]
    names = [n for n in weighted(make()) if "mlp" in n or "attn" in n or "ff.net" in n]
    model = make()
    adapter = adapted(model, fs.LoRA(rank=2), names)
    path = tmp_path / "x.safetensors"
    adapter.export(path, format=style)
    again = make()
    fs.load(again, path)
    assert relative(out(again), out(model)) < 1e-6
    if (style, which) != ("kohya", "transformer"):
        with without_a_word():
            assert relative(out(by_diffusers(path, make(), which)), out(model)) < 1e-6
    if which == "text_encoder":
        assert all(".text_model." in k or "_text_model_" in k for k in load_file(path))


def test_diffusers_splits_and_takes_what_we_write_for_flux_in_kohyas_spelling(tmp_path):
    names = [n for n in weighted(flux()) if "attn.to_" in n]
    model = flux()
    adapter = adapted(model, fs.LoRA(rank=2), names)
    adapter.export(tmp_path / "x.safetensors", format="kohya")
    theirs = by_diffusers(tmp_path / "x.safetensors", flux(), "transformer")
    assert relative(out(theirs), out(model)) < 1e-6


def test_ranks_of_their_own_stand_in_the_metadata(tmp_path):
    model = unet()
    adapter = adapted(model, fs.LoRA(rank=3), SOME)
    first = adapter.deltas[SOME[1]]
    first.switch_off(first.groups("rank")[1])
    adapter.compact()
    for style, path in (("diffusers", tmp_path / WEIGHTS), ("kohya", tmp_path / "k.safetensors")):
        adapter.export(path, format=style, per_module_rank=True)
        ranks = {v.shape[0] for k, v in load_file(path).items() if "down" in k or "lora_A" in k}
        assert ranks == {2, 3}
        with without_a_word():
            assert relative(out(by_diffusers(path, unet())), out(model)) < 1e-6
        again = unet()
        fs.load(again, path)
        assert relative(out(again), out(model)) < 1e-6
        path.unlink()
    adapter.export(tmp_path / WEIGHTS, format="diffusers")
    assert {v.shape[0] for k, v in load_file(tmp_path / WEIGHTS).items() if "A" in k} == {3}


def test_whose_file_it_is_and_where_it_comes_from(tmp_path):
    model = unet()
    adapted(model, fs.LoRA(rank=2), SOME).export(tmp_path / "x.safetensors", format="kohya")
    saved = read_adapter(tmp_path / "x.safetensors")
    assert saved.state.base.architecture == "UNet2DConditionModel"
    assert saved.state.lineage.method == "lora"
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"
    other = unet()
    torch.nn.init.normal_(other.conv_out.weight)
    torch.nn.init.normal_(other.conv_in.weight)
    torch.nn.init.normal_(other.conv_in.bias)
    with pytest.raises(BaseMismatch):
        fs.load(other, tmp_path / "x.safetensors")


def test_the_part_is_told_by_the_class_or_asked_for(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = adapted(model, fs.LoRA(rank=2), ["0"])
    with pytest.raises(InputError, match=r"is for a Sequential: say which part .* part='unet'"):
        adapter.export(tmp_path / "x", format="diffusers")
    with pytest.raises(InputError, match="part='unett' is no part that kohya names"):
        adapter.export(tmp_path / "x.safetensors", format="kohya", part="unett")
    adapter.export(tmp_path / "x", format="diffusers", part="text_encoder_3")
    assert all(k.startswith("text_encoder_3.0.") for k in load_file(tmp_path / "x" / WEIGHTS))
    whole = nn.ModuleDict({"unet": unet(), "text_encoder": text()})
    names = [f"unet.{SOME[0]}", "text_encoder.encoder.layers.0.mlp.fc1"]
    adapted(whole, fs.LoRA(rank=2), names).export(tmp_path / "y", format="diffusers")
    with without_a_word():
        theirs = by_diffusers(tmp_path / "y" / WEIGHTS, unet())
        words = by_diffusers(tmp_path / "y" / WEIGHTS, text(), "text_encoder")
    assert relative(out(theirs), out(whole["unet"])) < 1e-6
    assert relative(out(words), out(whole["text_encoder"])) < 1e-6


def test_what_these_formats_cannot_hold_is_refused(tmp_path):
    model = unet()
    adapter = fs.adapt(model, fs.LoRA(rank=2), SOME, train_modules=["conv_norm_out"])
    with pytest.raises(InputError, match=r"holds no 'conv_norm_out'; allow_full=False"):
        adapter.export(tmp_path / "x", format="diffusers")
    with pytest.raises(InputError, match="format='kohia' is not known; nearest: 'kohya'"):
        adapter.export(tmp_path / "x", format="kohia")
    with pytest.raises(InputError, match=r"one file: name it, such as x\.safetensors"):
        adapter.export(tmp_path / "x", format="kohya", allow_full=False)
    with pytest.raises(InputError, match="portable=False is for PEFT's format"):
        adapter.export(tmp_path / "x", format="diffusers", portable=False)
    with pytest.raises(InputError, match="part='unet' is for the formats"):
        adapter.export(tmp_path / "x", part="unet")
    assert not (tmp_path / "x").exists()
    table = fs.adapt(text(), fs.LoRA(rank=2), ["token_embedding"], train_modules=())
    with pytest.raises(InputError, match=r"is an embedding: .* or in this format of convolutions"):
        table.export(tmp_path / "x", format="diffusers")


# --- from files to files -------------------------------------------------------------------------
def test_native_files_become_diffusers_and_kohyas_without_a_model(tmp_path):
    model = unet()
    adapted(model, fs.LoRA(rank=3), SOME).save(tmp_path / "own")
    unet().save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"is a convolution, .* name its folder"):
        convert(tmp_path / "own", tmp_path / "x", "lora", format="diffusers")
    base = str(tmp_path / "base")
    convert(tmp_path / "own", tmp_path / "x", "lora", format="diffusers", model=base)
    convert(tmp_path / "x", tmp_path / "k.safetensors", "lora", format="kohya")
    convert(tmp_path / "k.safetensors", tmp_path / "back", "lora", model=base)
    convert(tmp_path / "x", tmp_path / "again", "lora")
    for place in ("x", "k.safetensors", "back", "again"):
        other = unet()
        fs.load(other, tmp_path / place)
        assert relative(out(other), out(model)) < 1e-6
    with without_a_word():
        assert relative(out(by_diffusers(tmp_path / "k.safetensors", unet())), out(model)) < 1e-6
    with pytest.raises(InputError, match="is the adapter itself"):
        convert(tmp_path / "x" / WEIGHTS, tmp_path / "x", "lora", format="diffusers")
    with pytest.raises(InputError, match="holds an adapter, which stays as it is"):
        convert(tmp_path / "x", tmp_path / "own", "lora", format="diffusers")


def test_a_kohya_file_of_many_parts_is_made_smaller_as_it_is(tmp_path):
    images, updates = lora(unet(), SOME, rank=4)
    words, _ = lora(text(), ["encoder.layers.0.mlp.fc1"], rank=4)
    save_file(kohya(images) | kohya(words, "lora_te1"), tmp_path / "k.safetensors")
    small = convert(
        tmp_path / "k.safetensors", tmp_path / "s.safetensors", fs.LoRA(rank=2), format="kohya"
    )
    assert 0 < small.error < 1
    before, after = load_file(tmp_path / "k.safetensors"), load_file(tmp_path / "s.safetensors")
    names = {k.replace("lora_te1_", "lora_te_") for k in before}
    assert names == {k.replace("lora_te1_", "lora_te_") for k in after}
    for key, down in after.items():
        if key.endswith("lora_down.weight"):
            assert down.shape == (2, *before[key].shape[1:])
    name = SOME[1]
    U, S, Vh = torch.linalg.svd(updates[name])
    best = shifted(unet(), {name: U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]})
    key = f"lora_unet_{name.replace('.', '_')}"
    only = {k: v for k, v in after.items() if k.startswith(key)}
    save_file(only, tmp_path / "one.safetensors")
    model = unet()
    fs.load(model, tmp_path / "one.safetensors")
    assert relative(out(model), out(best)) < 1e-6
    with pytest.raises(InputError, match="names text_encoder, unet; say which"):
        convert(tmp_path / "k.safetensors", tmp_path / "n", "lora")
    with pytest.raises(InputError, match="only the model's own names undo"):
        convert(tmp_path / "k.safetensors", tmp_path / "n", "lora", part="unet")


def test_the_command_line_exports_converts_and_inspects(tmp_path, capsys):
    model = unet()
    adapted(model, fs.LoRA(rank=3), SOME).save(tmp_path / "own")
    unet().save_pretrained(tmp_path / "base")
    own, base, file = str(tmp_path / "own"), str(tmp_path / "base"), str(tmp_path / "k.safetensors")
    assert run(["export", own, file, "--format", "kohya", "--model", base]) == 0
    assert run(["export", own, str(tmp_path / "d"), "--format", "diffusers", "--model", base]) == 0
    assert run(["convert", file, str(tmp_path / "n"), "--to", "lora", "--model", base]) == 0
    assert run(["inspect", file]) == 0
    assert "lora_unet_conv_in (8 x 36)" in capsys.readouterr().out
    for place in (file, tmp_path / "d", tmp_path / "n"):
        other = unet()
        fs.load(other, place)
        assert relative(out(other), out(model)) < 1e-6
    assert run(["export", own, file, "--format", "kohia"]) == 2
    assert "nearest: 'kohya'" in capsys.readouterr().err
