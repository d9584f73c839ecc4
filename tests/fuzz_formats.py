"""The formats that Finespun reads, each with a valid folder and a way to use a damaged one.

To fuzz another format, add a `Format` to FORMATS: `write` fills an empty folder, `use` does with it
what users would do, and asserts that whatever was read is what the files say.
"""

import functools
import json
import math
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft_folders import later
from safetensors.torch import load_file
from suite import batch, net, relative, stir
from tiny_run import write_recipe
from torch import Tensor

import finespun as fs
from finespun import files
from finespun.adapters.keys import spelt
from finespun.contract import SiteShape
from finespun.lifecycle.conversion.facts import compare, spectra
from finespun.lifecycle.stored import StoredWeights
from finespun.methods.structures import STRUCTURES
from finespun.training import checkpoint
from finespun.training.inference import Trained

Use = Callable[[Path, random.Random], None]
TARGETS = r"blocks\.\d\.(up|down)"
KINDS = {
    "lora": {"rank": 2}, "lsr": {"rank": 4, "separation_rank": 2}, "vera": {"rank": 6},
    "unilora": {"size": 60}, "nola": {"rank": 3, "k": 20}, "fourierft": {"frequencies": 40},
    "dora": {"rank": 2}, "lor2c": {"rank": 2}, "shira": {"rank": 2}, "tera": {"rank": 3},
    "vblora": {"num_vectors": 9, "vector_length": 4}, "lokr": {"rank": 2}, "randlora": {"rank": 5},
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """`digests`: a JSON file -> the file of tensors whose sha256 it holds; `inner`: where in the
    folder the files to damage lie; `weight`: how often it is drawn."""

    name: str
    write: Callable[[Path], None]
    use: Use
    digests: Mapping[str, str] = field(default_factory=dict)
    inner: str = "."
    weight: int = 10


# --- adapters ------------------------------------------------------------------------------------
def write_native(folder: Path, kind: str) -> None:
    targets = r"blocks\.\d" if STRUCTURES[kind].site_kind == "block" else TARGETS
    adapter = fs.adapt(net(), fs.make(kind, **KINDS[kind]), targets, ("head",), "first")
    stir(adapter.parameters())
    adapter.save(folder)


def write_by_peft(folder: Path) -> None:
    import peft

    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["up", "down"], modules_to_save=["head"],
        rank_pattern={"blocks.0.up": 2}, alpha_pattern={r"blocks\.\d+\.down": 5},
    )  # fmt: skip
    theirs = peft.get_peft_model(net(), config)
    stir([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(folder)


def write_export(folder: Path) -> None:
    adapter = fs.adapt(net(), fs.LSR(rank=4, separation_rank=2), TARGETS, ("head",), "first")
    stir(adapter.parameters())
    adapter.export(folder)


def use_adapter(folder: Path, draw: random.Random) -> None:
    """Load it, run it, and do one thing more; its updates are what the files say."""
    model, strict = net(), draw.random() < 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = fs.load(model, folder, strict=strict, force=draw.random() < 0.3)
    model(batch())
    if (folder / "adapter.json").is_file():
        as_stored(folder, adapter)
    else:
        as_peft_says(folder, adapter)
    look(folder, draw)


def as_stored(folder: Path, adapter: fs.Adapter) -> None:
    """Every tensor of the file, and no other, is in the adapter, at the precision of either."""
    raw, held = load_file(folder / "adapter.safetensors"), spelt(adapter.attached.tensors())
    assert raw.keys() == held.keys()
    for key, value in raw.items():
        assert torch.equal(value.to(held[key].dtype), held[key]), key
    told = json.loads((folder / "adapter.json").read_text())
    assert adapter.scale == told["strength"]
    assert adapter.structure.kind == told["structure"]["kind"]
    assert [s.name for s in adapter.attached.plan.sites] == [s[0] for s in told["plan"]["sites"]]


def as_peft_says(folder: Path, adapter: fs.Adapter) -> None:
    """ΔW = scale · B A at every site of the file, with PEFT's own reading of patterns."""
    from peft.utils.other import get_pattern_key

    told = json.loads((folder / "adapter_config.json").read_text())
    raw, found = load_file(folder / "adapter_model.safetensors"), adapter.updates()
    ending, start = ".lora_A.weight", "base_model.model."
    paths = [k.removesuffix(ending).removeprefix(start) for k in raw if k.endswith(ending)]
    assert found.keys() == set(paths)
    for path in paths:
        A, B = (raw[f"{start}{path}.lora_{side}.weight"].float() for side in "AB")
        patterns = told.get("alpha_pattern") or {}
        alpha = float(patterns.get(get_pattern_key(patterns, path), told.get("lora_alpha", 8)))
        scale = alpha / (math.sqrt(len(A)) if told.get("use_rslora") else len(A))
        wanted = (scale * B.double()) @ A.double()
        size = float(wanted.norm())
        assert not size or relative(found[path].dense(), wanted) < 1e-5 or not math.isfinite(
            float(wanted.float().norm())
        ), path  # fmt: skip


BY_PEFT = {
    "loha": later("LoHaConfig", r=3, alpha=7, rank_pattern={"blocks.0.up": 2}),
    "lokr": later("LoKrConfig", r=2, alpha=7, alpha_pattern={r"blocks\.\d+\.down": 5}),
    "miss": later("MissConfig", r=4, mini_r=8, init_weights="mini"),
    "oft": later("OFTConfig", oft_block_size=4, block_share=True, coft=True, eps=0.3),
    "unilora": later("UniLoraConfig", r=2, theta_d_length=50),
    "vblora": later(
        "VBLoRAConfig", r=2, num_vectors=20, vector_length=8, topk=2, save_only_topk_weights=True
    ),
    "vera": later("VeraConfig", r=4),
}


def write_method(folder: Path, kind: str) -> None:
    import peft

    config = BY_PEFT[kind]()
    config.target_modules, config.modules_to_save = ["up", "down"], ["head"]
    theirs = peft.get_peft_model(net(), config)
    stir([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(folder)


def use_method(folder: Path, draw: random.Random) -> None:
    """Load it and run it; where PEFT reads it too, at the layers of its tensors, both compute the
    same."""
    import peft

    told, model = files.summarise(folder), net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fs.load(model, folder, strict=draw.random() < 0.7)
        ours = model(batch())
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it misses
        try:
            theirs = peft.PeftModel.from_pretrained(net(), folder).eval()(batch())
        except Exception:
            return
    assert told is None or told.numbers
    named = json.loads((folder / "adapter_config.json").read_text()).get("target_modules")
    if sorted(named) == ["down", "up"] and ours.isfinite().all() and theirs.isfinite().all():
        assert relative(ours, theirs) < 1e-4


def look(folder: Path, draw: random.Random) -> None:
    """One of the commands that work on files alone."""
    what = draw.choice(["spectra", "lora", "lsr", "peft", "compare", "exact"])
    out = folder.parent / "converted"
    shutil.rmtree(out, ignore_errors=True)
    if what == "spectra":
        list(spectra(files.read_adapter(folder)))
    elif what == "compare":
        compare(folder, folder)
    elif what == "exact":
        fs.convert(folder, out, "lora")
    elif what == "lsr":
        fs.convert(folder, out, fs.LSR(rank=2, separation_rank=2))
    else:
        fs.convert(folder, out, fs.LoRA(rank=2), format="peft" if what == "peft" else "native")


def use_on_files(folder: Path, draw: random.Random) -> None:
    """Without a model: nothing but the files bounds what is built."""
    look(folder, draw)


# --- checkpoints, runs, bases --------------------------------------------------------------------
STEP = "step-000000007"


def write_checkpoint(folder: Path) -> None:
    state = {
        "step": 7, "rows": torch.arange(12.0).view(3, 4), "random": checkpoint.random_state(),
        "half": torch.ones(2, dtype=torch.float8_e4m3fn), "list": [1, 2.5, None, "x", (1, 2)],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "lr": math.inf},
    }  # fmt: skip
    checkpoint.save_checkpoint(folder, state)


def use_checkpoint(folder: Path, draw: random.Random) -> None:
    """What is read is there again after it was written again."""
    state = checkpoint.load_checkpoint(folder)
    again = folder.parent / "again"
    shutil.rmtree(again, ignore_errors=True)
    checkpoint.save_checkpoint(again, state | {"step": 7})
    found = checkpoint.load_checkpoint(again)
    assert equal(state | {"step": 7}, found)


def equal(a: object, b: object) -> bool:
    """Equal as values; NaN equals NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and repr(a.tolist()) == repr(b.tolist())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return repr(a) == repr(b)


@functools.cache
def finished() -> Path:
    """A folder with a tiny model, its table and the run of a recipe in `out`."""
    from finespun.cli.app import run

    place = Path(tempfile.mkdtemp(prefix="fuzz-run-"))
    assert run(["train", str(write_recipe(place, epochs=1)), "-q"]) == 0
    return place


def write_run(folder: Path) -> None:
    shutil.copytree(finished() / "out", folder, dirs_exist_ok=True)


def use_run(folder: Path, draw: random.Random) -> None:
    """Take the run up again and ask it something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = Trained.open(folder)
        for item in trained.predict(["the cat sleeps today"]):
            assert item.label is None or item.label in (trained.task.known or ())


BASE_SITE = SiteShape("blocks.0.up", 40, 24)


def write_base(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in net().state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 24}')


def use_base(folder: Path, draw: random.Random) -> None:
    """Read a weight and a bias of the base; what depends on them is converted."""
    stored = StoredWeights(folder)
    raw = load_file(folder / "model.safetensors")
    if stored.has(BASE_SITE, "bias"):
        stored.read(BASE_SITE, "bias")
    if "blocks.0.up.weight" in raw:
        assert equal(stored.read(BASE_SITE), raw["blocks.0.up.weight"])
    source, out = dora(), folder.parent / "converted"
    shutil.rmtree(out, ignore_errors=True)
    fs.convert(source, out, fs.LoRA(rank=2), model=folder)


@functools.cache
def dora() -> Path:
    place = Path(tempfile.mkdtemp(prefix="fuzz-dora-"))
    write_native(place, "dora")
    return place


def native(kind: str) -> list[Format]:
    write = functools.partial(write_native, kind=kind)
    digests = {"adapter.json": "adapter.safetensors"}
    heavy = 3 if kind in ("lora", "lsr") else 1
    return [
        Format(f"native {kind}", write, use_adapter, digests, weight=5 * heavy),
        Format(f"native {kind} on files", write, use_on_files, digests, weight=3 * heavy),
    ]


STATE = {"state.json": "state.safetensors"}
PEFT = {"finespun.json": "adapter_model.safetensors"}
FORMATS = (
    *(one for kind in KINDS for one in native(kind)),
    Format("PEFT's", write_by_peft, use_adapter, weight=30),
    Format("PEFT's on files", write_by_peft, use_on_files, weight=10),
    *(
        Format(f"PEFT's {kind}", functools.partial(write_method, kind=kind), use_method, weight=3)
        for kind in BY_PEFT
    ),
    Format("exported", write_export, use_adapter, PEFT, weight=20),
    Format("checkpoint", write_checkpoint, use_checkpoint, STATE, STEP, weight=25),
    Format("run", write_run, use_run, {"adapter.json": "adapter.safetensors"}, weight=6),
    Format("base", write_base, use_base, weight=15),
)  # fmt: skip
