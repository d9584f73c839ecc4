"""convert, export and merge keep older work; any adapter is exported where its base is named."""

import shutil
from pathlib import Path

import pytest
import torch
from peft_folders import bert, fresh, in_peft, logits, weights
from safetensors.torch import load_file
from suite import relative, same

import finespun as fs
from finespun import files
from finespun.cli.app import run
from finespun.errors import FileError, InputError
from finespun.files.overwrite import refuse_to_lose
from finespun.lifecycle.export import merge

pytestmark = pytest.mark.slow

TARGETS = ("query", "value")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a base, an adapter of rank 4 and one of rank 2."""
    monkeypatch.chdir(tmp_path)
    model = bert()
    model.save_pretrained("base")
    for name, rank, seed in (("a", 4, 0), ("b", 2, 1)):
        structure = fs.LoRA(rank=rank, seed=seed)
        adapter = fresh(model, structure, TARGETS, name=name, train_modules=())
        adapter.save(name)
        adapter.detach()
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, or the file itself."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


WAYS = {
    "convert": ["--to", "lora"],
    "convert peft": ["--to", "lora", "--format", "peft"],
    "export": ["--model", "base"],
    "export diffusers": ["--format", "diffusers", "--part", "text_encoder"],
    "export kohya": ["--format", "kohya", "--part", "text_encoder"],
    "merge": ["--model", "base"],
}


def write(way: str, src: str, dst: str, *more: str) -> int:
    return run([way.partition(" ")[0], src, dst, *WAYS[way], *more])


@pytest.mark.parametrize("way", WAYS)
def test_older_work_is_kept_unless_the_user_says_otherwise(place, way, capsys):
    dst = "out.safetensors" if "kohya" in way else "out"
    assert write(way, "a", dst) == 0
    before = content(place / dst)
    capsys.readouterr()
    assert write(way, "b", dst) == 2
    told = capsys.readouterr().err
    assert repr(dst) in told
    assert "--overwrite" in told
    assert content(place / dst) == before
    assert write(way, "b", dst, "--overwrite") == 0
    assert write(way, "b", f"fresh-{dst}") == 0
    assert content(place / dst) != before
    assert same(tensors(place / dst), tensors(place / f"fresh-{dst}"))


def tensors(where: Path) -> dict[str, torch.Tensor]:
    found = [where] if where.is_file() else where.glob("*.safetensors")
    return {key: value for path in found for key, value in load_file(path).items()}


@pytest.mark.parametrize("way", ["convert", "convert peft", "export", "export diffusers", "merge"])
def test_work_of_another_kind_always_stays(place, way, capsys):
    """Two kinds in one folder would be taken for one: transformers puts an adapter that lies
    beside a model onto it, and metrics would speak of another adapter."""
    fs.convert("a", "native", "lora")
    fs.convert("a", "peft", "lora", format="peft")
    fs.convert("a", "diffusers", "lora", format="diffusers", part="text_encoder")
    merge("a", "model", "base")
    shutil.copytree("native", "run")
    Path("run", "recipe.yaml").write_text("model: base\n")
    kind = {"convert": "native", "export": "peft", "merge": "model"}.get(way, way.split()[-1])
    for other in {"native", "peft", "diffusers", "model", "run"} - {kind}:
        before = content(place / other)
        assert write(way, "b", other, "--overwrite") == 2
        assert "which stays as it is: name another folder" in capsys.readouterr().err
        assert content(place / other) == before


def test_a_text_of_the_users_own_and_files_in_the_way_are_kept(place, capsys):
    Path("mine").mkdir()
    Path("mine", "README.md").write_text("my own words\n")
    Path("mine", "notes.txt").write_text("more\n")
    for way in ("convert", "export", "export diffusers", "merge"):
        assert write(way, "a", "mine/notes.txt", "--overwrite") == 3
        assert "is a file; name a folder" in capsys.readouterr().err
    for i, way in enumerate(("convert", "convert peft", "export", "merge")):
        shutil.copytree("mine", f"mine{i}")
        for more in ([], ["--overwrite"]):
            assert write(way, "a", f"mine{i}", *more) == 0
            assert Path(f"mine{i}", "README.md").read_text() == "my own words\n"
    Path("mine0", "README.md").unlink()
    assert write("convert", "a", "mine0", "--overwrite") == 0
    card = Path("mine0", "README.md").read_text()
    assert "# a\n" in card
    assert write("convert", "b", "mine0", "--overwrite") == 0
    assert "# b\n" in Path("mine0", "README.md").read_text()
    with pytest.raises(FileError, match="cannot be written"):
        refuse_to_lose("/proc/nowhere", "native")


UNKNOWN = {
    "convert": ["adapter.json", "adapter.safetensors"],
    "export": ["adapter_config.json", "adapter_model.safetensors"],
    "export diffusers": ["pytorch_lora_weights.safetensors"],
    "merge": ["config.json", "model.safetensors", "classifier.safetensors"],
}


@pytest.mark.parametrize("way", UNKNOWN)
def test_what_only_has_the_name_of_such_a_file_is_never_replaced(place, way, capsys):
    for i, name in enumerate(UNKNOWN[way]):
        Path(f"mine{i}").mkdir()
        Path(f"mine{i}", name).write_text('{"colour": "green"}')
        for more in ([], ["--overwrite"]):
            assert write(way, "a", f"mine{i}", *more) == 2
            assert f"holds {name} but is not known as a" in capsys.readouterr().err
        assert content(place / f"mine{i}") == {name: b'{"colour": "green"}'}


def test_one_file_is_replaced_only_where_it_is_a_lora(place, capsys):
    shutil.copy("base/model.safetensors", "weights.safetensors")
    Path("text.safetensors").write_text("words")
    for name in ("weights.safetensors", "text.safetensors"):
        before = content(place / name)
        assert write("export kohya", "a", name, "--overwrite") == 2
        assert "is a file without a LoRA, which stays" in capsys.readouterr().err
        assert content(place / name) == before


def test_a_pipeline_stays_and_other_settings_are_no_model(place, capsys):
    Path("pipeline").mkdir()
    Path("pipeline", "model_index.json").write_text("{}")
    assert write("merge", "a", "pipeline", "--overwrite") == 2
    assert "holds a pipeline of diffusers, which stays" in capsys.readouterr().err
    Path("pipeline", "model_index.json").rename("pipeline/config.json")
    assert write("convert", "a", "pipeline") == 0
    Path("out").mkdir()
    Path("out", "model-mine.safetensors").write_text("mine")
    assert write("merge", "a", "out") == 0
    assert Path("out", "model-mine.safetensors").read_text() == "mine"


@pytest.mark.parametrize("way", ["convert", "export", "merge"])
def test_places_that_cannot_be_are_told_before_any_work(place, way, capsys):
    assert write(way, "a", "") == 2
    assert "'' is no path" in capsys.readouterr().err
    assert write(way, "a", ".") == 3
    assert "holds the folder you are working in" in capsys.readouterr().err
    assert write(way, "nothere", "b") == 3
    told = capsys.readouterr().err
    assert "nothere is no folder and no file" in told
    assert "'b'" not in told


def test_what_a_crash_put_aside_is_kept_too(place):
    fs.convert("a", "out", "lora")
    Path("out").rename(".out.previous")
    with pytest.raises(InputError, match=r"'out' holds an adapter: --overwrite"):
        fs.convert("b", "out", "lora", overwrite=False)


def test_in_python_an_adapter_is_replaced_as_other_files_are(place):
    fs.convert("a", "out", "lora")
    fs.convert("b", "out", "lora")
    assert files.read_adapter("out").state.structure.rank == 2
    adapter = fs.load(bert(), "a")
    adapter.save("b")
    assert files.read_adapter("b").state.structure.rank == 4


def test_nothing_of_an_older_model_stays_in_the_new_one(place):
    import transformers

    Path("out", "1_Pooling").mkdir(parents=True)
    older = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    older += ["classifier.safetensors", "1_Pooling/config.json", "config.json"]
    for name in older:
        Path("out", name).write_text('{"model_type": "bert"}')
    Path("out", "table.safetensors").write_text("mine")
    assert write("merge", "a", "out", "--overwrite") == 0
    assert write("merge", "a", "fresh") == 0
    assert content(place / "out").keys() - {"table.safetensors"} == content(place / "fresh").keys()
    wanted, adapted = bert(), bert()
    fs.load(adapted, "a")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    assert relative(logits(plain), logits(adapted)) < 1e-5
    assert relative(logits(wanted), logits(adapted)) > 1e-3


# --- an adapter without a recipe ------------------------------------------------------------------
def test_an_adapter_that_python_saved_is_exported_on_the_base_that_is_named(place, capsys):
    assert run(["export", "a", "out"]) == 2
    told = capsys.readouterr().err
    assert "does not say which recipe made it" in told
    assert "name the base with --model" in told
    assert run(["export", "nothing", "out"]) == 3
    assert "--model" not in capsys.readouterr().err
    assert run(["export", "a", "out", "--model", "base"]) == 0
    adapted = bert()
    fs.load(adapted, "a")
    assert relative(logits(in_peft(bert(), Path("out"))), logits(adapted)) < 1e-5
    shape = fresh(bert(), fs.make("dora", rank=2), TARGETS, train_modules=())
    shape.save("dora")
    small = ["export", "dora", "small", "--model", "base", "--rank", "1", "--per-module-rank"]
    assert run(small) == 0
    assert all(t.shape[0] == 1 for k, t in weights(Path("small")).items() if "lora_A" in k)
    assert run(["export", "a", "x", "--model", "base", "--part", "unet"]) == 2
    assert "part belongs to --format diffusers" in capsys.readouterr().err


def test_a_head_is_left_out_of_one_file_on_request(place, capsys):
    fresh(bert(), fs.LoRA(rank=2), TARGETS).save("head")
    assert write("export kohya", "head", "k.safetensors") == 2
    assert "--no-allow-full (allow_full=False) leaves it out" in capsys.readouterr().err
    assert write("export kohya", "head", "k.safetensors", "--no-allow-full") == 0
    whole = files.read_adapter("head").state
    assert whole.trained == ("classifier",)
    fs.convert("head", "plain", "lora", allow_full=False)
    bare = files.read_adapter("plain").state
    assert not bare.trained
    assert not [key for key in bare.tensors if key.owner == "module"]


def test_a_base_that_cannot_be_the_one_is_told_in_a_line(place, capsys):
    Path("base", "config.json").write_text('{"model_type": "bert", "hidden_size": "wide"}')
    assert write("merge", "a", "out") == 3
    assert "cannot be loaded as BertForSequenceClassification" in capsys.readouterr().err
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8))
    fresh(plain, fs.LoRA(rank=2), ["0"], train_modules=()).save("plain")
    for way in ("merge", "export"):
        assert write(way, "plain", "out") == 2
        assert "made for a 'Sequential', which is no class of" in capsys.readouterr().err
    assert not Path("out").exists()


def test_options_of_a_conversion_are_told_as_they_are_typed(place, capsys):
    assert run(["convert", "a", "out", "--to", "lora", "--set", "rank"]) == 2
    assert "--set rank=8" in capsys.readouterr().err
    wrong = {
        "lora rank=0": "rank=0 must be at least 1",
        "lora rank=four": "rank = 'four' should be a valid integer",
        "lora alpha=-1": "alpha=-1",
        "lora dropout=2": "dropout=2",
        "lora runk=2": "'rank'",
        "lsr separation_rank=0": "separation_rank=0 must be at least 1",
        "lsr rank_split=[3,2]": "rank_split=(3, 2) must be",
    }
    for typed, told in wrong.items():
        to, option = typed.split()
        assert run(["convert", "a", "out", "--to", to, "--set", option]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {to}: structure")
        assert told in error
        assert error.count("\n") == 1
    fresh(bert(), fs.make("shira", rank=2), TARGETS, train_modules=()).save("shira")
    assert write("convert", "shira", "out") == 2
    assert "--set rank=16 or --energy 0.95" in capsys.readouterr().err
