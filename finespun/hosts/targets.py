"""Which modules are meant: names, suffixes, a regular expression, or a word for a kind of layer."""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from finespun.errors import TargetError, nearest

Targets = str | Sequence[str]
WORDS = ("all-linear", "attention", "mlp")
INSERTED = ("deltas", "copies", "finespun_banks")
HEAD_NAMES = ("classifier", "score", "qa_outputs", "classification_head", "head", "fc")
ATTENTION = re.compile(r"att(ention|n)(?!s)", re.IGNORECASE)
NUMBERED = re.compile(r"\.(\d+)(?:\.|$)")
UNREAD = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
IN_FRONT = re.compile(r"^(\d+)(?:\.|$)")


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every named module of the model itself; adapters' own modules are left out, unvisited."""
    found: dict[str, nn.Module] = {}
    seen = {id(model)}

    def walk(parent: nn.Module, prefix: str) -> None:
        for name, child in parent._modules.items():
            if child is not None and name not in INSERTED and id(child) not in seen:
                seen.add(id(child))
                found[prefix + name] = child
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return found


def find(
    model: nn.Module,
    targets: Targets,
    exclude: Targets = (),
    layers: Iterable[int] | None = None,
) -> list[str]:
    """Names of the modules that `targets` means, in model order.

    A string is "all-linear" (every linear layer but the output head), "attention" or "mlp" (those
    in or beside attention, inside repeated layers), or a regular expression that must match the
    whole name; a list holds these words, exact names or dotted suffixes, each with :PART for a
    slice of a fused projection. An empty list means no layer. `exclude` takes names away in
    the same language; `layers` keeps those whose first number in the name is among them. Raises
    TargetError, with the nearest names, where an entry matches nothing.
    """
    for given in (targets, exclude):
        if not isinstance(given, str | Sequence) or not all(isinstance(t, str) for t in given):
            raise TargetError(f"targets are names, not {given!r}; try 'all-linear' or ['query']")
    known = modules(model)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    regex = isinstance(targets, str) and targets not in WORDS
    found = [set(_match(model, known, target, regex)) for target in wanted]
    named = set().union(*found)
    away: set[str] = set()
    for target in [exclude] if isinstance(exclude, str) else exclude:
        away.update(_match(model, known, target, isinstance(exclude, str) and exclude not in WORDS))
    kept = None if layers is None else set(layers)
    order = {name: i for i, name in enumerate(known)}
    chosen = [
        name
        for name in sorted(named - away, key=lambda n: (order[n.partition(":")[0]], n))
        if kept is None or _layer(name, known) in kept
    ]
    if named and not chosen:
        raise TargetError(
            f"targets={targets!r} leaves no module after exclude={exclude!r} and "
            f"layers={None if kept is None else sorted(kept)}; without them {len(named)} match"
        )
    return chosen


def _match(model: nn.Module, known: dict[str, nn.Module], target: str, regex: bool) -> list[str]:
    base, colon, part = target.partition(":")
    if target in WORDS:
        found = [n for n, m in known.items() if _is_kind(model, known, n, m, target)]
    elif regex:
        found = [n for n in known if _pattern(target).fullmatch(n)]
    else:
        found = [n + colon + part for n in known if _ends(n, base)]
    if not found and target in WORDS:
        raise TargetError(_none_for(model, known, target))
    if not found and regex and any(_ends(n, base) for n in known):
        raise TargetError(
            f"the expression {target!r} matches no whole name, though names end so; put it in a "
            f"list: [{target!r}]"
        )
    if not found:
        raise TargetError(f"no module is called {target!r}; {_suggest(model, base, known)}")
    return found


def _none_for(model: nn.Module, known: dict[str, nn.Module], word: str) -> str:
    linear = [n for n, m in known.items() if isinstance(m, nn.Linear)]
    inside = next((p for n in linear if (p := unread(model, known, n)) is not None), None)
    if inside is not None:
        return (
            f"{word!r} finds no layer: those in a {inside} cannot be adapted, because its fast "
            "path reads weights without calling the layers"
        )
    kinds = sorted({type(m).__name__ for m in known.values() if "weight" in m._parameters})
    has = f"it has {', '.join(kinds)}: name some" if kinds else "it has none"
    return f"{word!r} finds no such layer in this {type(model).__name__}; {has}"


def unread(model: nn.Module, known: dict[str, nn.Module], name: str) -> str | None:
    """The class that a module lies in where that reads the module's parameters without calling it,
    as torch's own attention and encoder layer do on their fast path; else None."""
    parent = known.get(name.rpartition(".")[0], model)
    return next((cls.__name__ for cls in UNREAD if isinstance(parent, cls)), None)


def _is_kind(
    model: nn.Module, known: dict[str, nn.Module], name: str, module: nn.Module, word: str
) -> bool:
    linear = isinstance(module, nn.Linear) or type(module).__name__.endswith("Conv1D")
    if not linear or unread(model, known, name) or _is_head(model, name, module):
        return False
    if word == "all-linear":
        return True
    repeated = _layer(name, known) is not None
    return repeated and (ATTENTION.search(name) is not None) == (word == "attention")


def _layer(name: str, known: Iterable[str]) -> int | None:
    number = NUMBERED.search(name)
    if number is None and (front := IN_FRONT.search(name)):
        number = None if any(map(NUMBERED.search, known)) else front
    return int(number[1]) if number else None


def find_head(model: nn.Module) -> tuple[str, ...]:
    """The output head that a task model adds to a pretrained body: a direct child with one of the
    usual names in a class called ...For...Classification and the like; empty for other models."""
    task = re.search(
        r"For\w*(Classification|QuestionAnswering|MultipleChoice)|Classifier", type(model).__name__
    )
    return tuple(name for name, _ in model.named_children() if task and name in HEAD_NAMES)


def inside(name: str, trained: Sequence[str]) -> bool:
    """Whether a module is one of these, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in trained)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise TargetError(f"targets={text!r} is no regular expression: {error}") from error


def _suggest(model: nn.Module, target: str, known: dict[str, nn.Module]) -> str:
    for name, parameter in model.named_parameters():
        if _ends(name, target):
            return (
                f"{name!r} is a bare parameter {tuple(parameter.shape)}, no module: fused "
                "weights cannot be adapted"
            )
    leaves = {n.rsplit(".", 1)[-1] for n, m in known.items() if "weight" in m._parameters}
    return nearest(target.rsplit(".", 1)[-1], leaves | set(WORDS))


def _is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    outputs = (
        getattr(model, f"get_{w}", lambda: None)() for w in ("output_embeddings", "classifier")
    )
    inside = any(name == head or name.startswith(head + ".") for head in find_head(model))
    return inside or any(module is output for output in outputs)
