"""Which modules are meant: names, suffixes, a regular expression, or "all-linear"."""

import re
from collections.abc import Sequence

from torch import nn

from finespun.errors import TargetError, nearest

Targets = str | Sequence[str]
OWN = ("deltas", "copies", "finespun_banks")
HEADS = ("classifier", "score", "qa_outputs", "classification_head", "head", "fc")


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every named module of the model itself, adapters' own modules left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and not any(part in OWN for part in name.split("."))
    }


def find(model: nn.Module, targets: Targets) -> list[str]:
    """Names of the modules that `targets` means, in model order.

    A string is "all-linear" (every linear layer but the output head) or a regular expression that
    must match the whole name; a list holds exact names or dotted suffixes, an empty one means no
    layer. Raises TargetError, with the nearest names, where an entry matches nothing.
    """
    known = modules(model)
    if isinstance(targets, str):
        if targets == "all-linear":
            found = [
                n
                for n, m in known.items()
                if isinstance(m, nn.Linear) and not _is_head(model, n, m)
            ]
        else:
            found = [n for n in known if _pattern(targets).fullmatch(n)]
        if not found:
            raise TargetError(f"targets={targets!r} matches no module; {_suggest(targets, known)}")
        return found
    for target in targets:
        if not any(_ends(name, target) for name in known):
            raise TargetError(f"no module is called {target!r}; {_suggest(target, known)}")
    return [name for name in known if any(_ends(name, target) for target in targets)]


def find_head(model: nn.Module) -> tuple[str, ...]:
    """The output head that a task model adds to a pretrained body: a direct child with one of the
    usual names in a class called ...For...Classification and the like; empty for other models."""
    task = re.search(
        r"For\w*(Classification|QuestionAnswering|MultipleChoice)|Classifier", type(model).__name__
    )
    return tuple(name for name, _ in model.named_children() if task and name in HEADS)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise TargetError(f"targets={text!r} is no regular expression: {error}") from error


def _suggest(target: str, known: dict[str, nn.Module]) -> str:
    leaves = {n.rsplit(".", 1)[-1] for n, m in known.items() if isinstance(m, nn.Linear)}
    return nearest(target.rsplit(".", 1)[-1], leaves)


def _is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return module is output or name in find_head(model)
