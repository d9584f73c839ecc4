"""PEFT's models and ours from one folder, and nothing said by either."""

import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from peft_folders import weights
from peft_kinds import IDS
from suite import stir
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
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT's own
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not said


def by_peft(folder: Path, model: nn.Module, **options) -> nn.Module:
    """PEFT's model with every trained parameter moved, saved in `folder`."""
    import peft

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
