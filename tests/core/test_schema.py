"""Config sections: ranges, types, reading, and what is said about every mistake."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import (
    all_defaults,
    all_leaves,
    check,
    defaults,
    from_text,
    leaves,
    read,
    read_all,
    section,
    setting,
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    rank: int = setting(0, "0 = off", unit="columns")
    targets: tuple[str, ...] = setting(("q", "k"), "layers", choices=())

    def __post_init__(self) -> None:
        check(self, "model.adapter")


@dataclasses.dataclass(frozen=True)
class Model:
    init: str = setting("", "a MODEL")
    beta: float = setting(0.1, "pull to the reference", above=0, below=5)
    lowest: float = setting(-1.0, "any sign", minimum=-math.inf)
    kind: str = setting("a", "which", choices=("a", "b"))
    pack: bool = setting(True, "several sequences in a row")
    fields: dict[str, Any] = setting({}, "free")
    source: str | tuple[tuple[str, float], ...] = setting("", "a source or a mixture")
    adapter: Adapter = section(Adapter)
    bound: tuple[int, ...] = ()  # filled in by the wiring: no key

    def __post_init__(self) -> None:
        check(self, "model")


@dataclasses.dataclass(frozen=True)
class Top:
    seed: int = setting(0, "of everything that is drawn")

    def __post_init__(self) -> None:
        check(self, "")


SECTIONS = {"": Top, "model": Model}
LEAVES = all_leaves(SECTIONS)


def test_every_key_is_a_leaf_with_its_default():
    assert list(LEAVES) == [
        "seed",
        "model.init",
        "model.beta",
        "model.lowest",
        "model.kind",
        "model.pack",
        "model.fields",
        "model.source",
        "model.adapter.rank",
        "model.adapter.targets",
    ]
    assert defaults(Adapter) == {"rank": 0, "targets": ("q", "k")}
    assert all_defaults(SECTIONS)["model"]["adapter"] == {"rank": 0, "targets": ("q", "k")}
    assert all_defaults(SECTIONS)["seed"] == 0
    assert LEAVES["model.beta"].allowed() == "a number, more than 0 and less than 5"
    assert LEAVES["model.kind"].allowed() == "one of a, b"
    assert [leaf.rule.unit for leaf in leaves(Adapter)] == ["columns", ""]


def test_values_become_what_their_keys_ask_for():
    model = read(
        Model,
        {
            "beta": 1,
            "lowest": -3,
            "adapter": {"targets": ["v"]},
            "source": [["a.jsonl", 3]],
            "fields": {"n": {"m": (1,)}},
        },
        "model",
    )
    assert model.beta == 1.0 and isinstance(model.beta, float)
    assert model.lowest == -3.0
    assert model.adapter == Adapter(0, ("v",))
    assert model.source == (("a.jsonl", 3.0),)
    assert model.fields == {"n": {"m": [1]}}
    assert read(Model, {"source": '[["a", 2]]', "fields": '{"a": 1}'}).source == (("a", 2.0),)
    assert read(Model, {"source": "a.jsonl"}) == Model(source="a.jsonl")


def test_a_config_is_read_section_by_section():
    parts = read_all(SECTIONS, {"seed": 3, "model": {"adapter": {"rank": 4}}})
    assert parts[""] == Top(3)
    assert parts["model"].adapter.rank == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"beta": 0}}, r"^model\.beta is 0\.0; it must be more than 0 and less than 5\.$"),
        ({"model": {"beta": math.nan}}, r"^model\.beta is nan; it must be a finite number\.$"),
        ({"model": {"lowest": -math.inf}}, r"^model\.lowest is -inf; it must be a finite number\.$"),
        ({"model": {"lowest": 1e300}}, r"^model\.lowest is 1e\+300, a number too large for 32 bits"),
        ({"model": {"beta": "x"}}, r"^model\.beta is 'x'; it must be a number, more than 0"),
        ({"model": {"beta": True}}, r"^model\.beta is True; it must be a number"),
        ({"model": {"kind": "c"}}, r"^model\.kind is 'c'; use one of a, b\.$"),
        ({"model": {"pack": 1}}, r"^model\.pack is 1; it must be true or false\.$"),
        ({"model": {"adapter": {"rank": -1}}}, r"^model\.adapter\.rank is -1; it must be 0 or more\.$"),
        ({"model": {"adapter": {"rank": 1.5}}}, r"^model\.adapter\.rank is 1\.5; it must be a whole number"),
        ({"model": {"adapter": 3}}, r"^model\.adapter is 3, but it is a section"),
        ({"model": 3}, r"^model is 3, but it is a section"),
        (
            {"model": {"adapter": {"targets": [1]}}},
            r"^model\.adapter\.targets is \[1\]; it must be a list of text",
        ),
        ({"model": {"init": "x" * 3000}}, r"^model\.init has 3000 characters \('x.* \.\.\.\); at most 1000"),
        ({"model": {"init": "a\0b"}}, "null character"),
        (
            {"model": {"source": [["a", 1, 2]]}},
            r"^model\.source is \[\['a', 1, 2\]\]; it must be a text or a list",
        ),
        ({"model": {"source": "[[1"}}, r"^model\.source is '\[\[1', which is no JSON"),
        ({"model": {"source": [["a", math.inf]]}}, r"^model\.source holds inf; it must be a finite number"),
        ({"model": {"fields": {"a": math.nan}}}, r"^model\.fields is .*finite numbers"),
        ({"model": {"fields": {"a": "x" * 200_000}}}, r"^model\.fields has 2000\d\d characters"),
        ({"model": {"rankk": 1}}, r"^There is no config key 'model\.rankk'; the nearest is"),
        (
            {"model": {"adapter": {"rankk": 1}}},
            r"'model\.adapter\.rankk'; the nearest is 'model\.adapter\.rank'",
        ),
        ({"mdel": {}}, r"^There is no config key 'mdel'; the nearest is 'model'"),
        ({"model": {"learning_rate": 1}}, "what other libraries call so is model.beta here"),
        ({"seed": -1}, r"^seed is -1; it must be 0 or more"),
        ({"seed": 2**31}, "too large for 32 bits"),
    ],
)
def test_one_sentence_for_a_mistake(values: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as raised:
        read_all(SECTIONS, values, {"learning_rate": "model.beta"})
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("model.beta", "1e-3", 1e-3),
        ("model.lowest", "-2", -2.0),
        ("model.pack", "False", False),
        ("model.init", "[not json", "[not json"),
        ("model.adapter.targets", '["a", "b"]', ("a", "b")),
        ("model.adapter.targets", '("a", "b")', ("a", "b")),
        ("model.adapter.targets", "a", ("a",)),
        ("model.adapter.targets", "", ()),
        ("model.fields", '{"a": {"b": 1}}', {"a": {"b": 1}}),
        ("model.fields", "", {}),
        ("model.source", "hf:x", "hf:x"),
        ("model.source", "(old) rows.jsonl", "(old) rows.jsonl"),
        ("model.source", "{new} rows.jsonl", "{new} rows.jsonl"),
        ("model.source", " ", " "),
        ("model.source", '[["a", 1], ["b", 2]]', (("a", 1.0), ("b", 2.0))),
    ],
)
def test_texts_of_the_command_line(key: str, text: str, value: Any):
    assert from_text(LEAVES[key], text) == value


@pytest.mark.parametrize("text", ["nan", "inf", "", "1,5", "9" * 5000, "x"])
def test_texts_that_are_no_number(text: str):
    for key in ("seed", "model.beta"):
        with pytest.raises(InputError, match=key) as raised:
            from_text(LEAVES[key], text)
        assert len(str(raised.value)) < 300


def test_a_section_made_by_hand_is_checked_too():
    with pytest.raises(InputError, match=r"model\.beta is -1; it must be more than 0"):
        Model(beta=-1)
    assert Model(bound=(-1,)).bound == (-1,)


def test_json_that_is_nested_too_deeply():
    value: Any = {}
    for _ in range(2000):
        value = {"a": value}
    with pytest.raises(InputError, match=r"model\.fields"):
        read(Model, {"fields": value}, "model")
