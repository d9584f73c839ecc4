"""Everything PEFT's LoRA files hold, read and written: the two libraries compute the same."""

import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from peft_folders import config, weights
from peft_kinds import CASES, IDS, Kinds
from suite import relative, stir
from torch import nn

import finespun as fs


@contextmanager
def silence():
    """Raises for anything that PEFT, transformers or Python's warnings say."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("", "peft", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not said


def by_peft(folder: Path, model: nn.Module, **options) -> nn.Module:
    """PEFT's model with every trained number moved, saved in `folder`."""
    kind = peft.TrainableTokensConfig if "token_indices" in options else peft.LoraConfig
    rank = {} if "token_indices" in options else {"r": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, kind(**{**rank, **options})).eval()
        stir([p for p in theirs.parameters() if p.requires_grad])
        theirs.save_pretrained(folder)
    return theirs


def loaded(model: nn.Module, folder: Path) -> fs.Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*carries no fingerprint")
        return fs.load(model, folder)


@torch.no_grad()
def out(model: nn.Module) -> torch.Tensor:
    return model(IDS)


def shapes(folder: Path) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in weights(folder).items()}


@pytest.mark.parametrize("name", CASES)
def test_peft_to_us_and_back(tmp_path, name):
    theirs = by_peft(tmp_path / "theirs", Kinds().eval(), **CASES[name])
    model = Kinds().eval()
    adapter = loaded(model, tmp_path / "theirs")
    wanted = out(theirs)
    assert relative(out(model), wanted) < 1e-6
    assert relative(out(Kinds().eval()), wanted) > 1e-2
    with adapter.disabled():
        assert torch.equal(out(model), out(Kinds().eval()))

    adapter.export(tmp_path / "ours", portable=False)
    mixed = "fc" in CASES[name]["target_modules"]  # beside nn.Linear, whichever way it is said
    with warnings.catch_warnings() if mixed else silence():
        warnings.filterwarnings("ignore" if mixed else "error")
        again = peft.PeftModel.from_pretrained(Kinds().eval(), tmp_path / "ours").eval()
    assert relative(out(again), wanted) < 1e-6
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    again.save_pretrained(tmp_path / "back")
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "back")
    assert config(tmp_path / "ours").keys() < peft.LoraConfig().to_dict().keys()

    adapter.save(tmp_path / "native")
    for folder in ("ours", "native"):
        other = Kinds().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fs.load(other, tmp_path / folder)
        assert relative(out(other), wanted) < 1e-6
