"""The model card that lies beside an adapter: what it is, how it was made, what it reached."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from finespun.adapters.fingerprint import Fingerprint
from finespun.adapters.lineage import Lineage
from finespun.storage.atomic import settled, write_file
from finespun.storage.visible import code_block, code_span, markdown, one_line

CARD = "README.md"
CARD_START = re.compile(
    rb"---\r?\nlibrary_name: \w+\r?\ntags: \[finespun, "
)  # how `model_card` begins


def write_card(work: Path, folder: str | Path, card: str) -> None:
    """Put a card into `work`, which is to become `folder`. A README.md there that is no card of
    ours stays, and the adapter goes without one."""
    older = settled(folder) / CARD
    if not os.path.lexists(older) or _is_own(older):
        write_file(work / CARD, card)


def _is_own(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return CARD_START.match(file.read(1024)) is not None


def model_card(
    name: str,
    tensors: Mapping[str, Tensor],
    base: Fingerprint | None,
    lineage: Lineage,
    library: str = "finespun",
) -> str:
    """Markdown under the header that model hubs read: method and options, sizes, metrics, the exact
    recipe, parents, seeds and versions. What the lineage does not say is left out."""
    source = base.source if base is not None and base.source else None
    header = ["---", f"library_name: {library}", f"tags: [finespun, {_tag(lineage.method)}]"]
    header += [f"base_model: {_quoted(source)}"] if source else []
    count, size = sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    told = ", ".join(markdown(f"{key} = {value}") for key, value in lineage.options.items())
    lines = [*header, "---", "", f"# {markdown(name)}", ""]
    lines += [f"An adapter of method {code_span(lineage.method)}{f' ({told})' if told else ''}:"]
    lines += [
        f"{count:,} parameters, {size:,} bytes{f', for {code_span(source)}' if source else ''}."
    ]
    if lineage.metrics:
        lines += ["", "## Measured", "", "| metric | value |", "| --- | --- |"]
        lines += [f"| {markdown(key)} | {_shown(value)} |" for key, value in _flat(lineage.metrics)]
    if classes := lineage.task.get("classes"):
        lines += ["", "## Classes", "", ", ".join(code_span(str(name)) for name in classes)]
    if lineage.recipe is not None:
        lines += ["", "## Recipe", "", *code_block(lineage.recipe.strip(), "yaml")]
    lines += ["", "## Made", "", f"- on {markdown(lineage.created)}"] if lineage.created else []
    pairs = [("seeds", lineage.seeds), ("versions", lineage.versions)]
    for title, values in pairs:
        if values:
            lines.append(
                f"- {title}: " + ", ".join(markdown(f"{k} {v}") for k, v in values.items())
            )
    lines += [
        f"- from {code_span(p.name)}, tensors sha256 {markdown(p.sha256)}" for p in lineage.parents
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + one_line(text).replace("'", "''") + "'"


def _tag(text: str) -> str:
    """A method's name as it is, anything else in quotes."""
    return text if re.fullmatch(r"[\w.+-]+", text) else _quoted(text)


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else markdown(str(value))
