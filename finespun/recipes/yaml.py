"""The text side of recipes: YAML with line numbers, overrides, and errors a person can act on."""

import datetime
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from finespun.deprecated import rename_keys
from finespun.errors import FileError, InputError, nearest
from finespun.methods.axes import AXES
from finespun.storage.blame import DAMAGED
from finespun.storage.safe_io import read_given
from finespun.storage.visible import one_line

MOST_BYTES, MOST_NODES = 1 << 20, 100_000
MOST_OPEN, MOST_INDENT, DEEPEST, MOST_OVERRIDE = 100, 400, 32, 1 << 16
PLAIN = (str, int, float, bool, type(None), datetime.date)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as in YAML 1.2."""


# Resolver of floats such as 1e-3, for reading and so that text which looks like one is quoted.
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(*_FLOAT)


def read_yaml(text: str, source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in `text`, and the line of every dotted key.

    Raises InputError for broken YAML, a key given twice, or anything but a mapping.
    """
    node, values = _parsed(text, source)
    if not isinstance(values, dict):
        raise InputError(f"{source}: a recipe is a list of `key: value` lines, not {values!r}")
    lines: dict[str, int] = {}
    _walk(node, "", lines, source)
    return values, lines


def _parsed(text: str, source: str) -> tuple[Any, Any]:
    """The node and the value of YAML text. Raises InputError for what is no YAML, is nested too
    deeply, stands for too many values, or holds a value that cannot be one of a recipe."""
    try:
        check_brackets(text, source)
        node = yaml.compose(text, Loader=_Loader)
        if _nodes(node, {}) > MOST_NODES:
            raise InputError(f"{source}: aliases that stand for more than {MOST_NODES:,} values")
        value = yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise InputError(f"{source}: nested too deeply, or within itself") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{source}{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not YAML: {error}") from error
    except InputError:
        raise
    except DAMAGED as error:  # a date of month 13, 0b without digits, an integer of 5,000 digits
        raise InputError(f"{source}: a value that YAML cannot make: {error}") from error
    _check_values(value, source)
    return node, value


def check_brackets(text: str, source: str) -> None:
    """Raise InputError for text so deeply nested that to parse it takes seconds or the stack."""
    opened = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        opened = opened + 1 if bracket in "[{" else max(0, opened - 1)
        if opened > MOST_OPEN:
            raise InputError(f"{source}: nested too deeply: {MOST_OPEN} brackets are open at once")
    depth = max(((len(line) - len(line.lstrip(" -?"))) for line in text.splitlines()), default=0)
    if depth > MOST_INDENT:
        raise InputError(f"{source}: a line begins {depth:,} columns deep; at most {MOST_INDENT}")


def _check_values(value: Any, source: str, depth: int = 0) -> None:
    """Raise InputError for whole numbers beyond 64 bits, for nesting beyond 32 levels, and for
    kinds that no recipe has (sets, bytes); keys must be plain."""
    if depth > DEEPEST:
        raise InputError(f"{source}: nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, PLAIN):
                raise InputError(f"{source}: {one_line(repr(key))[:80]} cannot be a key")
        inner = [*value, *value.values()]
    elif isinstance(value, list):
        inner = value
    elif type(value) is int and not -(2**63) <= value < 2**63:
        raise InputError(f"{source}: {hex(value)[:40]} has more than 64 bits")
    elif not isinstance(value, PLAIN):
        raise InputError(f"{source}: {one_line(repr(value))[:80]} is of a kind no recipe has")
    else:
        return
    for part in inner:
        _check_values(part, source, depth + 1)


def _nodes(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node stands for, every alias written out."""
    if id(node) not in known and isinstance(node, yaml.CollectionNode):
        children = [c for item in node.value for c in (item if type(item) is tuple else (item,))]
        known[id(node)] = 1 + sum(_nodes(child, known) for child in children)
    return known.get(id(node), 1)


def _walk(node: Any, prefix: str, lines: dict[str, int], source: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        line = key.start_mark.line + 1
        if name in lines:
            raise InputError(f"{source}, line {line}: {name} was given in line {lines[name]} too")
        lines[name] = line
        _walk(value, f"{name}.", lines, source)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in nested mappings. Raises InputError for another form."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"override {override!r} is not of the form section.key=value")
    if len(override) > MOST_OVERRIDE:
        raise InputError(f"override {override[:80]!r}... has {len(override):,} characters")
    if len(keys) > DEEPEST:
        raise InputError(f"override {override[:80]!r}... names a key {len(keys):,} levels deep")
    try:
        value = _parsed(text, f"override {override[:80]!r}")[1]
    except InputError as error:
        raise InputError(f"override {override[:80]!r}: the value is not YAML: {error}") from error
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise InputError(f"override {override!r}: {key} is {inner!r}, which has no keys")
        values = inner
    values[keys[-1]] = value


def explain(
    error: ValidationError, model: type[BaseModel], lines: Mapping[str, int], source: str
) -> str:
    """One line for every wrong key: where it is, what it says, what would work."""
    told: dict[str, str] = {}
    for item in error.errors(include_url=False):
        key, owner = _place(item["loc"], model)
        shown = _inside(key, item["loc"]) if key in AXES else key
        line = next((f", line {lines[k]}" for k in (shown, key) if k in lines), "")
        told.setdefault(shown, f"{source}{line}: {_reason(item, shown, owner)}")
    return "\n".join(told.values())


def _place(loc: tuple[Hashable, ...], model: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """The dotted key of an error and the section it lies in; branches of unions are left out."""
    keys: list[str] = []
    owner = model
    for part in map(str, loc):
        keys.append(part)
        field = owner.model_fields.get(part)
        inner = field.annotation if field is not None else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        owner = inner
    return ".".join(keys), owner


def _reason(item: Mapping[str, Any], key: str, owner: type[BaseModel]) -> str:
    kind, value, name = item["type"], item["input"], key.rpartition(".")[2]
    if kind == "extra_forbidden":
        return f"{key} is not a key of a recipe; {nearest(name, owner.model_fields)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        return f"{key} = {value!r} is not known; {nearest(str(value), known)}"
    wish = re.sub("^(Input|Value) ", "", item["msg"])
    return f"{key} = {value!r} {wish}"


def _inside(key: str, loc: tuple[Hashable, ...]) -> str:
    """The key of an option: `loc` goes on below `key`, into a place that is no section."""
    return ".".join([key, *map(str, loc[1:2])])


class Quoting(yaml.SafeDumper):
    """Writes text with YAML's rarer line breaks in double quotes, where they can be escaped."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Quoting.add_representer(str, _text)
Quoting.add_implicit_resolver(*_FLOAT)


class Section(BaseModel):
    """A part of a YAML file: no unknown keys, no change after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, values: Any) -> Any:
        return rename_keys(cls.__name__, values) if isinstance(values, Mapping) else values


class Document(Section):
    """A whole YAML file; `noun` is what errors call it, `source` where its text came from."""

    noun: ClassVar[str] = "recipe"

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and apply `section.key=value` overrides.

        Raises FileError if it is missing, InputError for anything in it that cannot work.
        """
        file = Path(path).expanduser()
        try:
            text = read_given(file, MOST_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            near = [p.name for p in file.parent.glob("*.y*ml")]
            raise FileError(
                f"{cls.noun} {str(path)!r} cannot be read ({error}); "
                f"in {str(file.parent)!r} {nearest(file.name, near)}"
            ) from error
        return cls.parse(text, overrides, source=str(path))

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), source: str | None = None) -> Self:
        """Read YAML text; `source` names it in errors. Raises InputError."""
        source = source or cls.noun
        values, lines = read_yaml(text, source)
        return cls._checked(values, overrides, lines, source)

    @classmethod
    def _checked(
        cls,
        values: dict[str, Any],
        overrides: Sequence[str],
        lines: Mapping[str, int],
        source: str,
    ) -> Self:
        for override in overrides:
            apply_override(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            overridden = [override.partition("=")[0] for override in overrides]
            where = {key: line for key, line in lines.items() if key not in overridden}
            raise InputError(explain(error, cls, where, source)) from error
