"""merge, compare, inspect and convert on the command line, and the files that servers read."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft_folders import bert, config, fresh, in_peft, logits, weights
from suite import relative, stir
from tiny_lm import language_model, tokenizer, write_lm_recipe
from tiny_run import write_recipe

import finespun as fs
from finespun.cli.app import run
from finespun.errors import InputError, StateError
from finespun.files import read_adapter
from finespun.lifecycle.conversion.facts import compare, difference, spectra
from finespun.lifecycle.export import merge
from finespun.linalg import LowRank
from finespun.training.inference import Trained

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 9, 14, 17, 20, 6], [4, 4, 8, 30, 7, 2]])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of a classifier in out and of a language model in lm/out."""
    folder = tmp_path_factory.mktemp("convert")
    (folder / "lm").mkdir()
    assert run(["train", str(write_recipe(folder, epochs=1)), "-q"]) == 0
    lm = write_lm_recipe(folder / "lm", training={"epochs": 1})
    assert run(["train", str(lm), "-q"]) == 0
    return folder


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(arguments) == 0
    return capsys.readouterr().out


# --- merge ---------------------------------------------------------------------------------------
def test_a_merged_language_model_is_plain_transformers(done, tmp_path, capsys):
    import transformers

    out = printed(["merge", str(done / "lm" / "out"), str(tmp_path / "m"), "--json"], capsys)
    told = json.loads(out)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    trained = Trained.open(done / "lm" / "out")
    with torch.no_grad():
        wanted = trained.text.model(IDS).logits
        assert relative(plain(IDS).logits, wanted) < 1e-5
        assert relative(language_model()(IDS).logits, wanted) > 1e-2
    assert type(plain) is transformers.LlamaForCausalLM
    assert told["numbers"] == sum(p.numel() for p in plain.parameters())
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert words("the cat").input_ids == tokenizer()("the cat").input_ids


def test_a_trained_head_is_merged_too(tmp_path):
    import transformers

    model = bert()
    model.save_pretrained(tmp_path / "base")
    adapter = fresh(model, fs.make("dora", rank=2), ("query", "value"))
    assert adapter.attached.trained == ("classifier",)
    wanted = logits(model)
    adapter.save(tmp_path / "a")
    told = merge(tmp_path / "a", tmp_path / "m", str(tmp_path / "base"))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert relative(logits(plain), wanted) < 1e-5
    assert told.architecture == "BertForSequenceClassification"
    assert told.sites == 4


def test_a_folder_of_pefts_is_merged_by_its_task(tmp_path):
    import transformers

    model = bert()
    model.save_pretrained(tmp_path / "base")
    adapter = fresh(model, fs.LoRA(rank=2), ("query",))
    wanted = logits(model)
    adapter.export(tmp_path / "a")
    (tmp_path / "a" / "finespun.json").unlink()
    with pytest.warns(UserWarning, match="no fingerprint"):
        merge(tmp_path / "a", tmp_path / "m", str(tmp_path / "base"))
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert relative(logits(plain), wanted) < 1e-5


def test_of_a_sentence_encoder_the_encoder_is_written_and_its_head_beside_it(done, tmp_path):
    import transformers
    from safetensors.torch import load_file

    told = merge(done / "out", tmp_path / "m")
    assert "no transformers class" in str(told)
    trained = Trained.open(done / "out")
    plain = transformers.AutoModel.from_pretrained(tmp_path / "m", add_pooling_layer=False).eval()
    ids = torch.tensor([[2, 6, 7, 9, 3]])
    with torch.no_grad():
        states = plain(ids).last_hidden_state
        assert relative(states, trained.text.model.encoder(ids).last_hidden_state) < 1e-5
        head = load_file(tmp_path / "m" / "classifier.safetensors")
        mean = torch.nn.functional.rms_norm(states.mean(1), states.shape[-1:])
        logits = mean @ head["classifier.weight"].T + head["classifier.bias"]
        wanted = trained.text.model(ids, torch.ones_like(ids)).logits
    assert relative(logits, wanted) < 1e-5


def test_merges_that_cannot_be_are_refused(done, tmp_path):
    model = language_model()
    model.save_pretrained(tmp_path / "base")
    adapter = fs.adapt(model, fs.LoRA(rank=2), ("lm_head",))
    stir(adapter.parameters())
    adapter.save(tmp_path / "tied")
    with pytest.raises(StateError, match="untie them"):
        merge(tmp_path / "tied", tmp_path / "m", str(tmp_path / "base"))
    with pytest.raises(InputError, match="name the base with --model"):
        merge(tmp_path / "tied", tmp_path / "m")
    with pytest.raises(InputError, match="is the adapter itself"):
        merge(done / "out", done / "out")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="is the base itself"):
        merge(tmp_path / "tied", tmp_path / "base", str(tmp_path / "base"))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "m").exists()


# --- compare and inspect -------------------------------------------------------------------------
def test_differences_are_those_of_the_dense_updates():
    g = torch.Generator().manual_seed(3)
    a, b = (
        LowRank(torch.randn(r, 9, generator=g), torch.randn(12, r, generator=g)) for r in (3, 2)
    )
    found, x, y = difference("s", a, b), a.dense().double(), b.dense().double()
    assert found.norm_a == pytest.approx(float(x.norm()), rel=1e-5)
    assert found.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-5)
    assert found.distance == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    for name, p, q in (("outputs", x, y), ("inputs", x.T, y.T)):
        P, Q = (m @ torch.linalg.pinv(m, rtol=1e-5) for m in (p, q))
        assert getattr(found, name) == pytest.approx(float(torch.trace(P @ Q)) / 2, abs=1e-5)
    same = difference("s", a, a * -2.0)
    assert (same.cosine, same.inputs, same.outputs) == pytest.approx((-1, 1, 1), abs=1e-6)
    assert same.distance == pytest.approx(3, rel=1e-6)


def test_adapters_of_different_sites_are_compared_where_they_meet(tmp_path):
    fresh(bert(), fs.LoRA(rank=3), ("query", "value")).save(tmp_path / "a")
    fresh(bert(), fs.LSR(rank=4), ("query", "key"), name="b").save(tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [d.name.rpartition(".")[2] for d in found.sites] == ["query", "query"]
    assert all(n.endswith("value") for n in found.only_a)
    assert all(n.endswith("key") for n in found.only_b)
    itself = compare(tmp_path / "a", tmp_path / "a")
    assert itself.cosine == pytest.approx(1)
    assert itself.distance == pytest.approx(0, abs=1e-6)
    whole = {n: fs.load(bert(), tmp_path / n).updates() for n in "ab"}
    dense = {n: {k: u.dense().double() for k, u in w.items()} for n, w in whole.items()}
    inner = sum(float((v * dense["b"][k]).sum()) for k, v in dense["a"].items() if k in dense["b"])
    sizes = [sum(float(v.square().sum()) for v in dense[n].values()) for n in "ab"]
    assert found.cosine == pytest.approx(inner / (sizes[0] * sizes[1]) ** 0.5, abs=1e-6)
    apart = (sizes[0] + sizes[1] - 2 * inner) ** 0.5 / sizes[0] ** 0.5
    assert found.distance == pytest.approx(apart, rel=1e-5)


def test_spectra_are_those_of_the_dense_updates(tmp_path):
    adapter = fresh(bert(), fs.LSR(rank=4, separation_rank=2), ("query",))
    adapter.save(tmp_path / "a")
    updates = adapter.updates()
    for one in spectra(read_adapter(tmp_path / "a")):
        values = torch.linalg.svdvals(updates[one.name].dense().double())
        shares = values.square() / values.square().sum()
        shares = shares[shares > 0]
        assert one.top == pytest.approx(values[:4].tolist(), rel=1e-4)
        assert one.norm == pytest.approx(float(values.norm()), rel=1e-5)
        effective = float(torch.exp(-(shares * shares.log()).sum()))
        assert one.effective_rank == pytest.approx(effective, rel=1e-4)
        assert 1 <= one.effective_rank <= one.rank == 4
        assert one.health["condition_A"] > 0


def test_commands_print_tables_and_json(done, tmp_path, capsys):
    src, dst = str(done / "out"), str(tmp_path / "b")
    shown = printed(["convert", src, dst, "--to", "lora", "--set", "rank=1"], capsys)
    assert "predicted  true error" in shown
    assert "4 layers" in shown
    again = ["convert", src, dst, "--to", "lora", "--set", "rank=1", "--json", "--overwrite"]
    told = json.loads(printed(again, capsys))
    assert told["error"] == max(told["errors"].values()) > 0
    assert told["structure"]["rank"] == 1
    shown = printed(["compare", src, dst], capsys)
    assert "all layers" in shown
    found = json.loads(printed(["compare", src, dst, "--json"], capsys))
    assert len(found["sites"]) == 4
    assert found["distance"] == pytest.approx((1 - found["cosine"] ** 2) ** 0.5, abs=1e-4)
    assert found["runs"] == {}
    both = json.loads(printed(["compare", src, src, "--json"], capsys))
    assert both["runs"]["accuracy after"][0] == both["runs"]["accuracy after"][1]
    assert "num_update_parameters" in printed(["compare", src, src], capsys)
    shown = printed(["inspect", dst], capsys)
    assert "rank 1, effective 1.00" in shown
    assert "parents" in shown
    found = json.loads(printed(["inspect", src, "--json"], capsys))
    assert len(found["spectra"]) == 4
    assert {"norm", "rank", "effective_rank", "top", "health"} <= found["spectra"][0].keys()
    assert run(["convert", src, str(tmp_path / "c"), "--to", "krona", "--set", "a=1"]) == 2
    assert "krona has no option 'a'" in capsys.readouterr().err
    tight = ["--to", "lsr", "--set", "rank=2", "--set", "separation_rank=1", "--max-error", "0"]
    assert run(["convert", src, str(tmp_path / "c"), *tight]) == 2
    assert "Nothing was written" in capsys.readouterr().err


def test_updates_that_need_the_base_say_so(tmp_path, capsys):
    bert().save_pretrained(tmp_path / "base")
    fresh(bert(), fs.make("dora", rank=2), ("query",)).save(tmp_path / "a")
    assert "depends on the base weight" in printed(["inspect", str(tmp_path / "a")], capsys)
    base = ["--model", str(tmp_path / "base")]
    assert "effective" in printed(["inspect", str(tmp_path / "a"), *base], capsys)
    found = compare(tmp_path / "a", tmp_path / "a", tmp_path / "base")
    assert found.cosine == pytest.approx(1, abs=1e-5)


# --- what servers make of an exported file -------------------------------------------------------
def pairs(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Path -> A and B, from the keys alone."""
    found, ending = weights(folder), ".lora_A.weight"
    paths = [k.removesuffix(ending) for k in found if k.endswith(ending)]
    return {
        p.removeprefix("base_model.model."): (found[p + ending], found[f"{p}.lora_B.weight"])
        for p in paths
    }


def vllm(folder: Path) -> dict[str, torch.Tensor]:
    """One scale alpha / r for all, patterns passed over; refuses DoRA, bias and saved modules."""
    told = config(folder)
    assert told["bias"] == "none"
    assert not told["use_dora"]
    assert not told["modules_to_save"]
    assert told["r"] <= 16
    assert all(k.endswith(("lora_A.weight", "lora_B.weight")) for k in weights(folder))
    scale = told["lora_alpha"] / (told["r"] ** (0.5 if told["use_rslora"] else 1))
    return {p: (B * scale) @ A for p, (A, B) in pairs(folder).items()}


def sglang(folder: Path) -> dict[str, torch.Tensor]:
    """alpha / r of the config, one rank; q, k and v are stacked, those absent as zeros."""
    told = config(folder)
    held = pairs(folder)
    assert {A.shape[0] for A, _ in held.values()} == {told["r"]}
    return {p: B @ (A * (told["lora_alpha"] / told["r"])) for p, (A, B) in held.items()}


def lorax(folder: Path) -> dict[str, torch.Tensor]:
    """A and B stacked over layers for each kind of module, so one rank for each kind."""
    told, found = config(folder), {}
    held = pairs(folder)
    for leaf in told["target_modules"]:
        mine = [p for p in held if p.endswith("." + leaf)]
        A, B = (torch.stack([held[p][side] for p in mine]) for side in (0, 1))
        scale = told["lora_alpha"] / (told["r"] ** (0.5 if told["use_rslora"] else 1))
        found |= dict(zip(mine, torch.bmm(B, A) * scale))
    return found


def llama_cpp(folder: Path) -> dict[str, torch.Tensor]:
    """One alpha; the rank is read off each tensor; rsLoRA and patterns are not read; any other
    tensor aborts the conversion."""
    alpha = config(folder)["lora_alpha"]
    assert all(".lora_A." in k or ".lora_B." in k for k in weights(folder))
    return {p: (alpha / A.shape[0]) * (B @ A) for p, (A, B) in pairs(folder).items()}


def diffusers(folder: Path) -> dict[str, torch.Tensor]:
    """No config: the rank from B's columns, alpha = rank where there is no alpha tensor."""
    ranks = {p: B.shape[1] for p, (_, B) in pairs(folder).items()}
    return {p: (ranks[p] / ranks[p]) * (B @ A) for p, (A, B) in pairs(folder).items()}


@pytest.mark.parametrize(
    "structure",
    [fs.LoRA(rank=4, alpha=13), fs.LoRA(rank=4, alpha=3, rslora=True), fs.LSR(rank=4)],
    ids=str,
)
@pytest.mark.parametrize("way", ["export", "convert"])
def test_all_servers_compute_the_same_update_from_one_file(tmp_path, structure, way):
    model = bert()
    adapter = fs.adapt(model, structure, ("query", "value"), train_modules=())
    stir(adapter.parameters())
    adapter.scale = 0.7
    wanted = {n: u.dense().detach() for n, u in adapter.updates().items()}
    if way == "export":
        adapter.export(tmp_path / "x")
    else:
        adapter.save(tmp_path / "a")
        fs.convert(tmp_path / "a", tmp_path / "x", "lora", format="peft")
    for server in (vllm, sglang, llama_cpp, diffusers, *([lorax] if way == "export" else [])):
        found = server(tmp_path / "x")
        assert found.keys() == wanted.keys(), server.__name__
        for name in wanted:
            assert relative(found[name], wanted[name]) < 1e-6, (server.__name__, name)


def test_ranks_of_their_own_are_for_peft_alone(tmp_path):
    model = bert()
    adapter = fs.adapt(model, fs.LoRA(rank=6), ("query", "value"), train_modules=())
    stir(adapter.parameters())
    first = next(iter(adapter.deltas.values()))
    with torch.no_grad():
        first.B[:, 2:] = 0
    wanted = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = adapter.export(tmp_path / "x", max_error=1e-6, per_module_rank=True)
    ranks = {p: A.shape[0] for p, (A, _) in pairs(tmp_path / "x").items()}
    assert ranks[first.site.shape.name] == 2
    assert sorted(ranks.values()) == [2, 6, 6, 6]
    assert "servers ignore" in str(done)
    told = config(tmp_path / "x")
    assert told["alpha_pattern"] == told["rank_pattern"]
    assert list(told["rank_pattern"].values()) == [2]
    assert relative(logits(in_peft(bert(), tmp_path / "x")), wanted) < 1e-5
    other = bert()
    fs.load(other, tmp_path / "x")
    assert relative(logits(other), wanted) < 1e-5
    plain = adapter.export(tmp_path / "y")
    assert weights(tmp_path / "x").keys() == weights(tmp_path / "y").keys()
    assert plain.rank == 6


# --- what was converted is used as a run is -----------------------------------------------------
@pytest.fixture(scope="module")
def made(done: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that were made of the run in `done / out`, its classifier's logits all the same."""
    root = tmp_path_factory.mktemp("made")
    Trained.open(done / "out").adapter.export(root / "exported")
    fs.convert(done / "out", root / "exact", "lora")
    fs.convert(done / "out", root / "peft", "lora", format="peft")
    fs.convert(root / "exported", root / "back", fs.LSR(rank=2, separation_rank=16), refine=50)
    fs.convert(root / "exact", root / "again", fs.LoRA(rank=2))
    return {p.name: p for p in sorted(root.iterdir())}


@pytest.mark.parametrize("name", ["exported", "exact", "peft", "back", "again"])
def test_what_was_made_of_a_run_is_measured_and_asked(done, made, name, capsys, tmp_path):
    table, words = str(done / "table.csv"), ["the cat runs fine", "a grim dull train"]
    wanted = {}
    for place in (done / "out", made[name]):
        measured = json.loads(printed(["evaluate", str(place), "--json"], capsys))
        on_all = json.loads(printed(["evaluate", str(place), "--file", table, "--json"], capsys))
        lines = printed(["predict", str(place), *words, "--json"], capsys).splitlines()
        asked = [json.loads(line) for line in lines]
        assert [a["label"] in a["probabilities"] for a in asked] == [True, True]
        shares = [a["probabilities"]["good"] for a in asked]
        wanted[place] = [*measured.values(), *on_all.values(), *shares]
    first, second = wanted.values()
    assert second == pytest.approx(first, abs=1e-4)
    printed(["merge", str(made[name]), str(tmp_path / "m")], capsys)
    assert (tmp_path / "m" / "classifier.safetensors").is_file()


def test_recipe_classes_and_seeds_go_along_and_parents_are_named(done, made):
    run_line = read_adapter(done / "out").state.lineage
    assert run_line.task["classes"] == ["bad", "good"]
    for folder in made.values():
        line = read_adapter(folder).state.lineage
        assert (line.recipe, line.task) == (run_line.recipe, run_line.task)
        assert line.seeds["training"] == run_line.seeds["training"]
    parent = read_adapter(made["again"]).state.lineage.parents
    assert [p.sha256 for p in parent] == [read_adapter(made["exact"]).sha256]


def test_a_language_model_that_was_converted_answers(done, tmp_path, capsys):
    fs.convert(done / "lm" / "out", tmp_path / "a", "lora")
    asked = ["the cat sleeps today", "soon the ship stops"]
    told = [
        printed(["predict", str(place), *asked, "--json"], capsys)
        for place in (done / "lm" / "out", tmp_path / "a")
    ]
    first, second = ([json.loads(line) for line in text.splitlines()] for text in told)
    for a, b in zip(first, second, strict=True):
        assert a["label"] == b["label"]
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-4)


def test_without_classes_in_the_lineage_the_rows_tell_them(done, made, capsys):
    path = made["exact"] / "adapter.json"
    content = json.loads(path.read_text())
    del content["lineage"]["task"]
    path.write_text(json.dumps(content))
    assert Trained.open(made["exact"]).task.classes == ("bad", "good")


def test_a_folder_without_a_recipe_says_what_would_do(tmp_path, capsys):
    fresh(bert(), fs.LoRA(rank=2), ("query",)).save(tmp_path / "a")
    for command in ("evaluate", "predict"):
        more = [] if command == "evaluate" else ["x"]
        assert run([command, str(tmp_path / "a"), *more]) == 3
        assert "does not say which recipe made it" in capsys.readouterr().err


def test_blank_texts_are_refused_and_every_prediction_is_one_line(done, capsys):
    assert run(["predict", str(done / "out"), "a fine dog", " "]) == 2
    assert "text 2 of 2 is blank" in capsys.readouterr().err
    shown = printed(["predict", str(done / "out"), "a fine\ndog\truns", "a ship"], capsys)
    assert [line.split("\t")[2] for line in shown.splitlines()] == ["a fine dog runs", "a ship"]
    told = printed(["predict", str(done / "out"), "a fine\ndog", "--json"], capsys)
    assert json.loads(told)["text"] == "a fine\ndog"


def test_the_command_line_speaks_of_its_own_options(done, capsys, tmp_path):
    shown = printed(["export", str(done / "out"), str(tmp_path / "a")], capsys)
    assert "--no-allow-full leaves it out" in shown
    assert "allow_full" not in shown
    plain = ["export", str(done / "out"), str(tmp_path / "b"), "--no-allow-full"]
    assert "left out" in printed(plain, capsys)
    assert not config(tmp_path / "b")["modules_to_save"]


def test_inspect_says_what_kind_of_folder_it_is(done, made, capsys, tmp_path):
    def kind(folder: Path) -> str:
        return json.loads(printed(["inspect", str(folder), "--json"], capsys))["format"]

    Trained.open(done / "out").adapter.export(tmp_path / "small", rank=1)
    assert kind(done / "out") == "Finespun's own"
    assert kind(made["exported"]) == "PEFT's, exported from lsr, exact"
    assert kind(tmp_path / "small").startswith("PEFT's, exported from lsr, relative error up to ")


def test_a_strangers_text_cannot_steer_the_terminal(tmp_path, capsys):
    fresh(bert(), fs.LoRA(rank=2), ("query",)).save(tmp_path / "a")
    path = tmp_path / "a" / "adapter.json"
    content = json.loads(path.read_text())
    content["lineage"]["metrics"] = {"x": "\x1b[2Jgone"}
    path.write_text(json.dumps(content))
    shown = printed(["inspect", str(tmp_path / "a")], capsys)
    assert "\x1b" not in shown
    assert r"\x1b[2Jgone" in shown


def test_a_gguf_adapter_of_the_exported_tensors_says_the_same(tmp_path):
    """llama.cpp's converter is in no package; its names and scale are, so the file is written here:
    NAME.lora_a (r, in), NAME.lora_b (out, r), adapter.lora.alpha; ΔW = alpha / r · B A."""
    import gguf

    model = bert()
    adapter = fs.adapt(model, fs.LSR(rank=4), ("query", "value"), train_modules=())
    stir(adapter.parameters())
    wanted = {n: u.dense().detach() for n, u in adapter.updates().items()}
    adapter.export(tmp_path / "x")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "bert")
    writer.add_string(gguf.Keys.General.TYPE, gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config(tmp_path / "x")["lora_alpha"])
    for path, (A, B) in pairs(tmp_path / "x").items():
        writer.add_tensor(f"{path}.lora_a", A.numpy())
        writer.add_tensor(f"{path}.lora_b", B.numpy())
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    alpha = float(reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents())
    held = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert len(held) == 2 * len(wanted)
    for name, delta in wanted.items():
        A, B = held[f"{name}.lora_a"], held[f"{name}.lora_b"]
        assert relative(alpha / len(A) * (B @ A), delta) < 1e-6
