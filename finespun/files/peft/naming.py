"""The names by which PEFT finds modules, and no others."""

import re
from typing import Any

from finespun.hosts.targets import inside


def target_modules(sites: list[str], known: list[str], trained: tuple[str, ...]) -> Any:
    """Leaf names where they mean these sites and no others, else whole names, else a pattern."""
    others = [n for n in known if n not in sites and not inside(n, trained)]
    leaves = sorted({s.rpartition(".")[2] for s in sites})
    for names in (leaves, sorted(sites)):
        if not any(o == n or o.endswith("." + n) for o in others for n in names):
            return names
    return "|".join(re.escape(s) for s in sorted(sites))


def module_name(name: str, trained: tuple[str, ...], known: list[str]) -> str:
    """PEFT takes every module whose path ends with the name, so that "classifier" would take
    "pre_classifier" too: then the path from PEFT's own root is given."""
    twins = [n for n in known if n.endswith(name) and n != name and not inside(n, trained)]
    return f"model.{name}" if twins else name
