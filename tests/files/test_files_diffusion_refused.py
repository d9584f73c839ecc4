"""LoRA files of diffusers and kohya that are refused, and names that mean several layers."""

import json
from pathlib import Path

import pytest
import torch
from diffusion_files import (
    Draw,
    adapted,
    kohya,
    lora,
    unet,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from suite import relative
from torch import Tensor, nn

import finespun as fs
from finespun.adapters.state import AdapterState
from finespun.contract import Plan, SiteShape
from finespun.errors import FileError, InputError, PlanError, StrictError, TargetError
from finespun.files import read_adapter
from finespun.files.diffusion.names import Layer, Unplaced, place_on
from finespun.files.diffusion.write import Update
from finespun.linalg import LowRank

pytestmark = pytest.mark.filterwarnings("ignore:.*carries no fingerprint:UserWarning")
WEIGHTS = "pytorch_lora_weights.safetensors"
SOME = ["conv_in", "mid_block.resnets.0.conv1", "up_blocks.1.attentions.0.proj_in",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]  # fmt: skip


def one_layer() -> dict[str, Tensor]:
    tensors, _ = lora(unet(), [SOME[3]])
    return kohya(tensors)


KEY = f"lora_unet_{SOME[3].replace('.', '_')}"
BAD = {
    "typo": ({f"{KEY}.lora_dwn.weight": 1}, FileError, "nearest: 'lora_down.weight'"),
    "no layer": (
        {KEY.replace("to_q", "to_p") + f".{leaf}": leaf for leaf in ("lora_down.weight",
         "lora_up.weight")}, TargetError, "is no layer of this model; nearest: 'mid_block_att"),
    "half": ({f"{KEY}.lora_up.weight": None}, FileError, "its 'up' is missing"),
    "dora": ({f"{KEY}.dora_scale": 1}, FileError, "DoRA's magnitudes over inputs, which is not"),
    "whole": ({f"{KEY}.diff": 1}, FileError, "a whole weight's difference, which is not read"),
    "alpha": ({f"{KEY}.alpha": torch.ones(2)}, FileError, r"alpha' is \(2,\), expected one number"),
    "NaN": ({f"{KEY}.alpha": torch.tensor(float("nan"))}, FileError, "NaN or infinite"),
    "size": ({f"{KEY}.lora_up.weight": torch.ones(5, 3)}, PlanError, "is 5x16, the model's"),
    "shape": ({f"{KEY}.lora_up.weight": torch.ones(16, 4)}, FileError, "is ill-shaped: "),
    "wide": ({f"{KEY}.lora_up.weight": torch.ones(16, 3, 3, 3)}, FileError, "is ill-shaped"),
    "two": ({"unet.conv_in.lora_A.weight": torch.ones(2, 2)}, FileError, "kohya's spelling and"),
    "other": ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, FileError, "'w1_b' is missing"),
    "both": ({f"{KEY}.hada_w1_a": torch.ones(2, 2)}, FileError, "holds lora, loha"),
    "nothing": (None, FileError, "there is no tensor in it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused_by_key(tmp_path, name):
    changes, error, message = BAD[name]
    held = one_layer()
    for key, value in (dict.fromkeys(held) if changes is None else changes).items():
        if value is None:
            del held[key]
        elif isinstance(value, str):
            held[key] = held[f"{KEY}.{value}"].clone()
        else:
            held[key] = torch.ones(()) if isinstance(value, int) else value
    save_file(held, tmp_path / "x.safetensors")
    model = unet()
    with pytest.raises(error, match=message):
        fs.load(model, tmp_path / "x.safetensors")
    assert not hasattr(model, "_finespun_adapters")


def test_pickles_are_not_opened_and_files_are_found(tmp_path):
    torch.save(one_layer(), tmp_path / "x.pt")
    with pytest.raises(FileError, match="is pickled and not opened"):
        fs.load(unet(), tmp_path / "x.pt")
    (tmp_path / "x.pt").rename(tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="truncated or no safetensors"):
        fs.load(unet(), tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"name the file, such as .*x\.safetensors"):
        fs.load(unet(), tmp_path)


def test_metadata_that_disagrees_is_refused(tmp_path):
    held = {f"unet.{SOME[3]}.lora_{s}.weight": torch.ones(z) for s, z in
            (("A", (2, 16)), ("B", (16, 2)))}  # fmt: skip
    for told, message in (
        ({"unet.r": 3}, "the config gives it rank 3"),
        ({"unet.r": 2, "unet.use_qalora": True}, "not read: use_qalora"),
        ({"unet.r": 2, "unet.peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ):
        metadata = {"lora_adapter_metadata": json.dumps(told)}
        save_file(held, tmp_path / "x.safetensors", metadata)
        with pytest.raises(FileError, match=message):
            fs.load(unet(), tmp_path / "x.safetensors")


def test_lenient_reading_passes_over_what_metadata_says_more(tmp_path):
    held = {f"unet.{SOME[3]}.lora_{s}.weight": torch.ones(z) for s, z in
            (("A", (2, 16)), ("B", (16, 2)))}  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.new": 5})}
    save_file(held, tmp_path / "x.safetensors", metadata)
    with pytest.raises(StrictError, match="new=5 is unknown") as caught:
        fs.load(unet(), tmp_path / "x.safetensors")
    assert caught.value.__notes__ == ["strict=False skips it"]
    with pytest.warns(UserWarning, match="new=5 is unknown"):
        fs.load(unet(), tmp_path / "x.safetensors", strict=False)


def test_sizes_that_would_take_all_the_memory_are_refused(tmp_path):
    draw = Draw()
    core = {"hada_w1_a": draw(1, 16), "hada_w2_a": draw(1, 16), "hada_w1_b": draw(1, 400_000),
            "hada_w2_b": draw(1, 400_000), "hada_t1": draw(1, 1, 400_000, 1),
            "hada_t2": draw(1, 1, 400_000, 1)}  # fmt: skip
    save_file({f"lora_unet_conv_in.{k}": v for k, v in core.items()}, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="bytes would be made"):
        read_adapter(tmp_path / "x.safetensors")


# --- names --------------------------------------------------------------------------------------
WORDS = st.sampled_from(["a", "b", "a_b", "0", "1", "to_q", "q"])
NAMES = st.lists(WORDS, min_size=1, max_size=4).map(".".join)


def file_of(updates: list[Update], style: str, tmp: Path) -> Unplaced:
    sites = tuple(
        SiteShape(u.name(style), u.factors.B.shape[0], u.factors.A.shape[1]) for u in updates
    )
    where = {u.name(style): (u.part, u.path if style == "diffusers" else u.path.replace(".", "_"))
             for u in updates}  # fmt: skip
    plan = Plan(sites, {s.name: {} for s in sites})
    state = AdapterState.pack("x", fs.LoRA(rank=1), plan, {})
    return Unplaced(state, "", style=style, where=where)


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=8, unique=True), st.data())
def test_names_come_back_or_are_said_to_be_ambiguous(tmp_path_factory, names, data):
    """Every layer of a model is found under its own name in diffusers' spelling; in kohya's, unless
    another of the same size is spelled alike: then both are named."""
    sizes = {n: data.draw(st.integers(1, 2)) for n in names}
    layers = {n: Layer(SiteShape(n, s, 3), ()) for n, s in sizes.items()}
    name = data.draw(st.sampled_from(names))
    one = Update("unet", name, LowRank(torch.ones(1, 3), torch.ones(sizes[name], 1)), 1)
    for style in ("diffusers", "kohya"):
        saved = file_of([one], style, tmp_path_factory.getbasetemp())
        alike = [n for n in names if n.replace(".", "_") == name.replace(".", "_")
                 and sizes[n] == sizes[name]]  # fmt: skip
        if style == "kohya" and len(alike) > 1:
            with pytest.raises(TargetError, match="may mean") as told:
                place_on(saved, layers)
            assert all(repr(n) in str(told.value) for n in alike)
        else:
            assert [s.name for s in place_on(saved, layers).state.plan.sites] == [name]


def test_two_layers_of_one_spelling_are_not_written(tmp_path):
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.Linear(4, 4)
            self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})

    adapter = adapted(Twins(), fs.LoRA(rank=1), ["a_b", "a.b"])
    with pytest.raises(InputError, match="are both 'lora_unet_a_b' in this format"):
        adapter.export(tmp_path / "x.safetensors", format="kohya", part="unet")
    adapter.export(tmp_path / "x", format="diffusers", part="unet")
    x = torch.ones(1, 4)
    again = Twins()
    again.load_state_dict(
        {k: v for k, v in adapter.model.state_dict().items() if "deltas" not in k}
    )
    found = fs.load(again, tmp_path / "x", part="unet")
    for name in ("a_b", "a.b"):
        assert relative(again.get_submodule(name)(x), adapter.model.get_submodule(name)(x)) < 1e-6
    assert len(found.deltas) == 2
