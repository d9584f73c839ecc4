"""The model card beside an adapter: its figures are the adapter's own, and nobody reads it back."""

import torch
import yaml
from torch import nn

import finespun as fs
from finespun.adapters.lineage import Parent, lineage_of
from finespun.files.provenance.model_card import CARD, model_card

TENSORS = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}


def test_it_tells_sizes_metrics_recipe_and_parents():
    lineage = lineage_of(
        fs.LSR(rank=4),
        recipe="model: x\n",
        metrics={"after": {"accuracy": 0.91234}, "rows": 7},
        seeds={"training": 3},
        parents=(Parent("first", "00ff"),),
        task={"kind": "classify", "classes": ["no", "yes"]},
    )
    card = model_card("mine", TENSORS, None, lineage)
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": "finespun", "tags": ["finespun", "lsr"]}
    assert "17 parameters, 58 bytes" in body
    assert "| after.accuracy | 0.9123 |" in body
    assert "| rows | 7 |" in body
    assert "````yaml\nmodel: x\n````" in body
    assert "`no`, `yes`" in body
    assert "structure 0, training 3" in body
    assert "from `first`, tensors sha256 00ff" in body


def test_it_lies_beside_every_saved_and_exported_adapter_and_is_not_read(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = fs.adapt(model, fs.LSR(rank=2, separation_rank=1), ["0"], train_modules=())
    adapter.save(tmp_path / "own")
    adapter.export(tmp_path / "lora")
    own, lora = ((tmp_path / name / CARD).read_text() for name in ("own", "lora"))
    assert "method `lsr`" in own
    assert f"{adapter.num_update_parameters:,} parameters" in own
    assert "library_name: peft" in lora
    for name in ("own", "lora"):
        (tmp_path / name / CARD).write_text("something else")
        fs.load(model, tmp_path / name, name)


def test_a_text_that_is_no_card_of_ours_stays(tmp_path):
    adapter = fs.adapt(nn.Sequential(nn.Linear(8, 8)), fs.LoRA(rank=2), ["0"], train_modules=())
    for name, write in (("own", adapter.save), ("lora", adapter.export)):
        card = tmp_path / name / CARD
        write(card.parent)
        first = card.read_text()
        card.write_text(first + "changed\n")
        write(card.parent)
        assert card.read_text() == first
        card.write_text("---\nlibrary_name: peft\ntags:\n- lora\n---\nmine\n")
        write(card.parent)
        assert card.read_text().endswith("mine\n")
        card.unlink()
        card.mkdir()
        (card / "note").write_text("mine")
        write(card.parent)
        assert (card / "note").read_text() == "mine"
