"""One TOML file and some `key=value` pairs into one tree of frozen pydantic models, or a refusal in words.

Knows nothing of what is set: `stillroom_shared.settings` holds the models. Keys are dotted (`rounds.noise_multiplier`).
A setting of type `dict[str, SomeGroup]` is a table of groups whose names the file chooses: `teachers.large.weight` is
the setting `teachers.*.weight`. A list of tables is one setting, whose mistakes are told by table and key.
TOML has no null, so the text `none` unsets a setting that may be unset, in a file as on the command line.

| given | result |
|---|---|
| unknown key | refused, with the nearest known one |
| value of another type, or out of its bounds | refused, with what is allowed and the default |
| a number as text, in a file | refused: only the command line is text |
| several mistakes | all named, one on a line |
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from stillroom_shared.errors import SettingsError

_BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}", "min_length": "not empty"}
ANY = "*"
"""Stands in a key for a name that the file chooses."""
_KINDS = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}


class Group(BaseModel):
    """A table of the settings file. Frozen; a key it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


Tree = TypeVar("Tree", bound=Group)


def load(
    defaults: Tree,
    path: Path | None,
    overrides: Mapping[str, str],
    *,
    preset: Callable[[Mapping[str, object]], Mapping[str, object]] = lambda given: {},
) -> Tree:
    """The defaults, changed by the preset, the file and the overrides, later ones winning.

    `preset` sees what the file and the overrides give, by dotted key, and answers what follows from it.
    Raises `SettingsError`.
    """
    known = dict(fields(type(defaults)))
    given = dict(_read(path)) if path else {}
    for key, text in overrides.items():
        field = _known(key, known)
        given[key] = _from_text(field.annotation, text) if field else text
    # A table without a word, `[teachers.large]`, has every default; tables stand in the order in which they are named.
    empty = {key for key, value in given.items() if value == {} and _holds(key, known)}
    tables = [key if key in empty else key.rpartition(".")[0] for key in given]
    given = {key: value for key, value in given.items() if key not in empty}
    if unknown := [key for key in given if _known(key, known) is None]:
        raise SettingsError("\n".join(_unknown(key, known) for key in unknown))
    tree = defaults.model_dump(mode="json")
    for key in filter(None, tables):
        table = tree
        for group in key.split("."):
            table = table.setdefault(group, {})
    for key, value in {**preset(given), **given}.items():
        *groups, name = key.split(".")
        table, field = tree, _known(key, known)
        for group in groups:
            table = table.setdefault(group, {})
        table[name] = None if value == "none" and field and _may_be_none(field.annotation) else value
    try:
        # Through JSON: pydantic's strict mode then reads lists as tuples and text as paths, but no text as a number.
        return type(defaults).model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        values = dict(_flat(defaults.model_dump()))
        raise SettingsError("\n".join(_refusal(problem, known, values) for problem in error.errors())) from None


def fields(model: type[Group]) -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by dotted key, group by group."""
    for prefix, group in _groups(model):
        yield from ((f"{prefix}{name}", field) for name, field in group.model_fields.items() if not _inner(field))


def allowed(field: FieldInfo) -> str:
    """The values that a setting takes, in words.

    >>> from pydantic import Field
    >>> class Toy(Group):
    ...     rate: float | None = Field(0.5, gt=0, le=1)
    ...     layers: tuple[int, ...] = ()
    >>> [allowed(field) for _, field in fields(Toy)]
    ['number, above 0, at most 1, or none', 'list of integer']
    """
    rules = ((getattr(rule, name, None), text) for rule in field.metadata for name, text in _BOUNDS.items())
    bounds = [text.format(bound) for bound, text in rules if bound is not None]
    return ", ".join([_kind(field.annotation), *bounds, *["or none"] * _may_be_none(field.annotation)])


_INTRODUCTION = (
    "# Settings",
    "",
    "`make docs` writes this page from the code. In a file, given with `--settings FILE`, each group is a table;",
    "on the command line, write `--set rounds.rounds=20 --set distil.layers=0,5`. `none` unsets a setting.",
)


def reference(scales: Mapping[str, Group], introduction: Sequence[str] = _INTRODUCTION) -> str:
    """The manual page of all settings, in Markdown: defaults at each scale, what is allowed, what it means."""
    columns = [dict(_flat(settings.model_dump())) for settings in scales.values()]
    model = type(next(iter(scales.values())))
    lines = [*introduction]
    for prefix, group in _groups(model):
        summary = (group.__doc__ or "").partition("\n")[0]
        lines += ["", f"## {prefix.rstrip('.') or 'Without a group'}", "", summary, ""]
        lines += [f"| setting | {' | '.join(scales)} | allowed | meaning |", "|" + "---|" * (3 + len(scales))]
        for name, field in group.model_fields.items():
            if not _inner(field):
                usual = field.get_default(call_default_factory=True) if ANY in prefix else None
                shown = " | ".join(f"`{_text(column.get(prefix + name, usual))}`" for column in columns)
                lines.append(f"| `{prefix}{name}` | {shown} | {allowed(field)} | {field.description} |")
    return "\n".join(lines)


def _groups(model: type[Group], prefix: str = "") -> Iterator[tuple[str, type[Group]]]:
    """Groups with the prefix of their keys, the model itself last."""
    for name, field in model.model_fields.items():
        if inner := _inner(field):
            group, step = inner
            yield from _groups(group, f"{prefix}{name}{step}.")
    yield prefix, model


def _inner(field: FieldInfo) -> tuple[type[Group], str] | None:
    """The group that a field is, or that its named tables are, and what stands for their names in its key."""
    kind, step = field.annotation, ""
    if get_origin(kind) is dict:
        kind, step = get_args(kind)[1], f".{ANY}"
    return (kind, step) if isinstance(kind, type) and issubclass(kind, Group) else None


def _lists_groups(field: FieldInfo) -> bool:
    """Whether a setting is a list of tables."""
    kind = next(iter(get_args(field.annotation)), None)
    return isinstance(kind, type) and issubclass(kind, Group)


def _known(key: str, known: Mapping[str, FieldInfo]) -> FieldInfo | None:
    """The setting that a key names; one of its parts may be a name that the file chose."""
    parts = key.split(".")
    chosen = (".".join([*parts[:place], ANY, *parts[place + 1 :]]) for place in range(1, len(parts) - 1))
    return next((known[one] for one in (key, *chosen) if one in known), None)


def _bare(annotation: Any) -> Any:
    """The type without `| None` and without what `Annotated` adds."""
    if _may_be_none(annotation):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _holds(key: str, known: Mapping[str, FieldInfo]) -> bool:
    """Whether a key names a table of settings."""
    parts = key.split(".")
    starts = (one.split(".")[: len(parts)] for one in known if one.count(".") >= len(parts))
    return any(all(own in (part, ANY) for own, part in zip(start, parts, strict=True)) for start in starts)


def _may_be_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _kind(annotation: Any) -> str:
    bare = _bare(annotation)
    if get_origin(bare) is tuple:
        return f"list of {_kind(get_args(bare)[0])}"
    if isinstance(bare, type) and issubclass(bare, Group):
        return "table"
    return _KINDS.get(bare) or " or ".join(map(str, get_args(bare)))


def _text(value: object) -> str:
    """A value as it is written on the command line, the same on every machine."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or " "
    text = str(value).replace(str(Path.home()), "~") if isinstance(value, Path) else str(value)
    return text.replace("\n", "\\n")


def _from_text(annotation: Any, text: str) -> object:
    """Text of the command line as the value it stands for; what stands for none stays text, and is refused later."""
    bare = _bare(annotation)
    if get_origin(bare) is tuple:
        parts = (part.strip() for part in text.strip("[] ").split(","))
        return [_from_text(get_args(bare)[0], part) for part in parts if part]
    if bare is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return bare(text) if bare in (int, float) else text
    except ValueError:
        return text


def _read(path: Path) -> Iterator[tuple[str, object]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path} is not TOML: {error}") from error
    return _flat(tables)


def _flat(tables: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tables.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _unknown(key: str, known: Mapping[str, FieldInfo]) -> str:
    name = key.rpartition(".")[2]
    near = get_close_matches(key, known, n=1) or [other for other in known if other.rpartition(".")[2] == name]
    return f"setting {key} is unknown: " + (f"did you mean {near[0]}?" if near else "docs/settings.md lists them all")


def _refusal(problem: ErrorDetails, known: Mapping[str, FieldInfo], defaults: Mapping[str, object]) -> str:
    parts = [str(part) for part in problem["loc"]]
    # Positions in a list and branches of a union follow the name of the setting.
    starts = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    key, field = next(((start, found) for start in starts if (found := _known(start, known))), (None, None))
    # Several settings of a group that do not fit together, or a table in a list of tables: the model's own words.
    if key is None or field is None or _lists_groups(field):
        return f"settings of {'.'.join(parts)}: {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] == "missing":
        return f"setting {key} is missing: give {allowed(field)} ({field.description})"
    default = _text(defaults[key] if key in defaults else field.get_default(call_default_factory=True))
    return (
        f"setting {key} is {problem['input']!r}: give {allowed(field)} ({field.description}); the default is {default}"
    )
