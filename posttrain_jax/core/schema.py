"""Config sections as dataclasses: every key has a default, a unit, a range and one line of help, in one place.

A section is a frozen dataclass whose fields are made by `setting` (a value) or `section` (a dataclass inside), and
whose `__post_init__` calls `check`:

    @dataclasses.dataclass(frozen=True)
    class Options:
        beta: float = setting(0.1, "strength of the pull to the reference", above=0)
        loss: str = setting("dpo", "the loss", choices=("dpo", "ipo"))

        def __post_init__(self) -> None:
            check(self, "dpo")  # then the checks of several keys together

Types of a value: bool, int, float, str, tuple[X, ...], tuple[X, Y], dict[str, Any] (JSON), and unions of these. A
number is finite and not negative unless its setting says otherwise, and fits the 32 bits in which JAX computes.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from posttrain_jax.core.errors import InputError, shown

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4028235e38  # float32
MOST_JSON = 100_000
"""Characters of a JSON value."""

Section = TypeVar("Section")
Sections = Mapping[str, type]
"""A config: the dataclass of each of its sections by name; "" has the keys that lie in no section."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a key's value may be, and what it means.

    Attributes:
      help: one line.
      unit: of the value, "" where it has none.
      minimum, maximum: included.
      above, below: not included.
      choices: the texts that it may be; () = any.
      longest: most characters of a text.
    """

    help: str
    unit: str = ""
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    longest: int = 1000

    def range_text(self) -> str:
        """The range of a number in words, "" where it has none."""
        low = high = ""
        if self.above is not None:
            low = f"more than {self.above:.10g}"
        elif self.minimum is not None and self.minimum != -math.inf:
            low = "0 or more" if self.minimum == 0 else f"at least {self.minimum:.10g}"
        if self.below is not None:
            high = f"less than {self.below:.10g}"
        elif self.maximum is not None and self.maximum < LARGEST_INT:
            high = f"at most {self.maximum:.10g}"
        return " and ".join(filter(None, (low, high)))

    def allows(self, number: float) -> bool:
        """Whether a number lies in the range."""
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.maximum is None or number <= self.maximum)
            and (self.below is None or number < self.below)
        )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A key of a config: its dotted name, the type of its value, its default and its rule."""

    key: str
    type: Any
    default: Any
    rule: Rule

    def allowed(self) -> str:
        """What the value may be, in words."""
        if self.rule.choices:
            return f"one of {', '.join(self.rule.choices)}"
        has_range = self.type in (int, float) or typing.get_args(self.type)[:1] in ((int,), (float,))
        return ", ".join(filter(None, (type_text(self.type), self.rule.range_text() if has_range else "")))


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    longest: int = 1000,
) -> Any:
    """A field of a section; see `Rule` for the arguments. Numbers without a lower bound must be 0 or more; give
    `minimum=-math.inf` where any sign makes sense."""
    if minimum is None and above is None:
        minimum = 0
    rule = Rule(help, unit, minimum, above, maximum, below, tuple(choices), longest)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"rule": rule})
    return dataclasses.field(default=default, metadata={"rule": rule})


def section(kind: type) -> Any:
    """A field that is a section inside a section."""
    return dataclasses.field(default_factory=kind)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(kind)


def _fields(kind: type) -> list[tuple[str, Any, Any, Rule | None]]:
    """(name, type, default, rule) of every field; the rule of a section inside is None. Fields that are neither, such
    as what the wiring fills in later, are no keys."""
    hints = _hints(typing.cast(Any, kind))
    known = []
    for field in dataclasses.fields(kind):
        rule = field.metadata.get("rule")
        if rule is None and not dataclasses.is_dataclass(hints[field.name]):
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        known.append((field.name, hints[field.name], default, rule))
    return known


def leaves(kind: type, prefix: str = "") -> Iterator[Leaf]:
    """Every key of a section, in order, with dotted names below `prefix`."""
    for name, hint, default, rule in _fields(kind):
        key = f"{prefix}.{name}" if prefix else name
        if rule is None:
            yield from leaves(hint, key)
        else:
            yield Leaf(key, hint, default, rule)


def all_leaves(sections: Sections) -> dict[str, Leaf]:
    """Every key of a config by its dotted name."""
    return {leaf.key: leaf for name, kind in sections.items() for leaf in leaves(kind, name)}


def defaults(kind: type) -> dict[str, Any]:
    """The default of every key of a section, nested."""
    return {name: defaults(hint) if rule is None else default for name, hint, default, rule in _fields(kind)}


def all_defaults(sections: Sections) -> dict[str, Any]:
    """The default of every key of a config, nested."""
    nested: dict[str, Any] = {}
    for name, kind in sections.items():
        nested |= {name: defaults(kind)} if name else defaults(kind)
    return nested


def values(instance: Any) -> dict[str, Any]:
    """The value of every key of a section, nested: plain JSON."""
    own = vars(instance)
    return {
        name: values(own[name]) if rule is None else _plain(own[name])
        for name, _, _, rule in _fields(type(instance))
    }


def all_values(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a config, from its sections as `read_all` gives them."""
    nested: dict[str, Any] = {}
    for name, instance in sections.items():
        nested |= {name: values(instance)} if name else values(instance)
    return nested


def check(instance: Any, where: str) -> None:
    """Checks type and range of every key of a section by itself.

    Args:
      instance: of a section.
      where: the section's dotted name.

    Raises:
      InputError: names the key, its value and what it may be.
    """
    values = vars(instance)
    for name, hint, default, rule in _fields(type(instance)):
        if rule is not None:
            key = f"{where}.{name}" if where else name
            _check_value(Leaf(key, hint, default, rule), values[name])


def read(kind: type[Section], values: Mapping[str, Any], where: str = "") -> Section:
    """A section from nested values; keys that are not given have their defaults.

    Where the type of a key asks for it, whole numbers become floats, lists tuples, and JSON texts what they stand for.

    Raises:
      InputError: an unknown key, a value of the wrong type or out of its range; names the key.
    """
    known = {name: (hint, default, rule) for name, hint, default, rule in _fields(kind)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{where}.{name}" if where else str(name)
        if name not in known:
            raise InputError(unknown_key(key, [leaf.key for leaf in leaves(kind, where)]))
        hint, default, rule = known[name]
        if rule is not None:
            arguments[name] = convert(Leaf(key, hint, default, rule), value)
        elif isinstance(value, Mapping):
            arguments[name] = read(hint, value, key)
        else:
            raise InputError(f"{key} is {shown(value)}, but it is a section, with keys of its own.")
    return kind(**arguments)


def read_all(
    sections: Sections, values: Mapping[str, Any], synonyms: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Every section of a config from its nested values.

    Args:
      sections: of the config.
      values: nested; keys that are not given have their defaults.
      synonyms: as in `unknown_key`.

    Raises:
      InputError: as `read`.
    """
    known = all_leaves(sections)
    top = {key for key in known if "." not in key}
    for name, value in values.items():
        if name not in top and (name not in sections or not name):
            raise InputError(unknown_key(name, [*known, *filter(None, sections)], synonyms))
        if name in sections and not isinstance(value, Mapping):
            raise InputError(f"{name} is {shown(value)}, but it is a section, with keys of its own.")
    for key in flat_keys(values, known):
        if key not in known and not any(name.startswith(f"{key}.") for name in known):
            raise InputError(unknown_key(key, [*known], synonyms))
    return {
        name: read(kind, values.get(name, {}), name)
        if name
        else read(kind, {key: value for key, value in values.items() if key in top})
        for name, kind in sections.items()
    }


def flat_keys(values: Mapping[str, Any], known: Mapping[str, Leaf], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values; a key that a schema knows is a leaf, whatever its value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            flat |= flat_keys(value, known, f"{key}.")
        else:
            flat[key] = value
    return flat


def unknown_key(key: str, known: list[str], synonyms: Mapping[str, str] | None = None) -> str:
    """One sentence for a key that is not there, with the key that was probably meant.

    Args:
      key: dotted.
      known: those that there are.
      synonyms: the last part of a key, as other libraries call it, to ours.
    """
    meant = (synonyms or {}).get(key.rpartition(".")[2], "")
    if meant in known or meant.startswith("--"):
        return f"There is no config key {shown(key)}; what other libraries call so is {meant} here."
    near = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.0)
    return f"There is no config key {shown(key)}" + (f"; the nearest is {near[0]!r}." if near else ".")


def from_text(leaf: Leaf, text: str) -> Any:
    """A value from the command line, by the type of its key.

    Raises:
      InputError: the text is no such value.
    """
    if leaf.type is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise InputError(f"{leaf.key} is {shown(text)}; it must be true or false.")
        return text.lower() in ("true", "1")
    if leaf.type is int or leaf.type is float:
        try:
            return convert(leaf, leaf.type(text))
        except (ValueError, OverflowError):
            raise InputError(f"{leaf.key} is {shown(text)}; it must be {leaf.allowed()}.") from None
    return convert(leaf, text)


def convert(leaf: Leaf, value: Any) -> Any:
    """A value as its key has it: see `read`.

    Raises:
      InputError: names the key, the value and what it may be.
    """
    if isinstance(value, str) and leaf.type not in (bool, int, float, str):
        value = _from_json(leaf, value)
    try:
        value = _converted(leaf.type, value)
    except (TypeError, RecursionError):
        raise InputError(f"{leaf.key} is {shown(value)}; it must be {leaf.allowed()}.") from None
    _check_value(leaf, value)
    return value


def _from_json(leaf: Leaf, text: str) -> Any:
    """What a text stands for where a list or an object is expected: JSON, or the same in Python's notation."""
    start = text.strip()[:1]
    if start != "[" and _is_union(leaf.type) and str in typing.get_args(leaf.type):
        return text  # a file's name can begin with "(" or "{"
    if not start:
        return {} if typing.get_origin(leaf.type) is dict else ()
    if start not in "[{(":
        return (text,) if leaf.type == tuple[str, ...] else text  # one text stands for a list of one
    with contextlib.suppress(ValueError, RecursionError):
        if len(text) <= MOST_JSON:
            return json.loads(text)
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise InputError(f"{leaf.key} is {shown(text)}, which is no JSON; give {leaf.allowed()}.") from None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _converted(hint: Any, value: Any) -> Any:
    """The value, as `hint` has it. Raises TypeError where it is of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        for one in arguments:
            try:
                return _converted(one, value)
            except TypeError:
                continue
        raise TypeError
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(_converted(arguments[0], item) for item in value)
        if len(value) == len(arguments):
            return tuple(_converted(one, item) for one, item in zip(arguments, value, strict=True))
        raise TypeError
    if origin is dict and isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= LARGEST_FLOAT else value
    if origin is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_value(leaf: Leaf, value: Any) -> None:
    rule = leaf.rule
    try:
        _converted(leaf.type, value)
    except TypeError:
        raise InputError(f"{leaf.key} is {shown(value)}; it must be {leaf.allowed()}.") from None
    if rule.choices and value not in rule.choices:
        raise InputError(f"{leaf.key} is {shown(value)}; use {leaf.allowed()}.")
    if isinstance(value, dict):
        try:
            size = len(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            raise InputError(f"{leaf.key} is {shown(value)}; it must be JSON, with finite numbers.") from None
        if size > MOST_JSON:
            raise InputError(f"{leaf.key} has {size} characters; at most {MOST_JSON} make sense.")
        return
    for item in _scalars(value):
        _check_scalar(leaf, item)


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _scalars(item)
    else:
        yield value


def _check_scalar(leaf: Leaf, value: Any) -> None:
    rule = leaf.rule
    if isinstance(value, str):
        if len(value) > rule.longest:
            raise InputError(
                f"{leaf.key} has {len(value)} characters ({shown(value, 40)}); at most {rule.longest} make sense."
            )
        if "\0" in value:
            raise InputError(f"{leaf.key} is {shown(value)}; a null character has no place there.")
        return
    if isinstance(value, bool):
        return
    verb = "is" if leaf.type in (int, float) else "holds"
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{leaf.key} {verb} {value}; it must be a finite number.")
    if not rule.allows(value):
        raise InputError(f"{leaf.key} {verb} {shown(value)}; it must be {rule.range_text()}.")
    if abs(value) > (LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT):
        raise InputError(f"{leaf.key} {verb} {shown(value)}, a number too large for 32 bits.")


def type_text(hint: Any) -> str:
    """A type in words."""
    if hint is bool:
        return "true or false"
    if _is_union(hint):
        return " or ".join(type_text(one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_noun(typing.get_args(hint)[0])}"
    return f"a {_noun(hint)}"


def _noun(hint: Any) -> str:
    nouns = {int: "whole number", float: "number", str: "text"}
    if typing.get_origin(hint) is tuple:
        return f"[{', '.join(_noun(one) for one in typing.get_args(hint))}]"
    return nouns.get(hint, "JSON object")
