"""Whatever rows hold: they are counted, or there is one line with file and line; also when bad rows are skipped."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.formats import to_conversation
from posttrain_jax.data.preferences import to_preference
from posttrain_jax.data.rows import RowError, texts_in
from posttrain_jax.data.tokenized import TokenizeOptions, build
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer

TEXTS = st.sampled_from(
    [
        "",
        " ",
        "a",
        "Hi?",
        "Hi? Yes.",
        "The sky is",
        "The sky is blue",
        "{",
        '{"name": "f"}',
        "\ud83d",
        "user",
        "gpt",
    ]
)
NUMBERS = st.sampled_from([0, 1, 2, -1, 0.5, 1e300, 10**400, float("nan"), float("inf"), True, False])
PLAIN = st.one_of(TEXTS, NUMBERS, st.none())
ANY = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
CALL = st.fixed_dictionaries({}, optional={"name": TEXTS, "arguments": ANY, "function": ANY, "id": ANY})
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(
            ["system", "developer", "user", "assistant", "tool", "function", "human", None, 3, ["user"]]
        ),
        "from": st.sampled_from(["human", "gpt", "ChatGPT", "observation", "function_call", {}, None]),
        "text": TEXTS | ANY,
        "content": TEXTS
        | st.lists(
            st.fixed_dictionaries(
                {}, optional={"type": TEXTS | st.sampled_from(["text", "thinking"]), "text": PLAIN}
            )
        )
        | ANY,
        "value": TEXTS | ANY,
        "tool_calls": st.lists(CALL, max_size=2) | ANY,
        "function_call": CALL | ANY,
        "thinking": PLAIN,
        "reasoning": TEXTS,
        "weight": PLAIN,
        "train": PLAIN,
        "mask": PLAIN,
        "images": ANY,
        "time": ANY,
    },
)
USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
CHAT = st.sampled_from(
    [[USER], [ANSWER], [USER, ANSWER], [USER, {**ANSWER, "content": "No."}], [ANSWER, USER, ANSWER]]
)
TURNS = st.one_of(
    CHAT, st.lists(MESSAGE, max_size=3), st.fixed_dictionaries({"role": st.just(["user"]), "content": ANY})
)
PROMPT_COLUMNS = (
    "prompt",
    "question",
    "instruction",
    "input",
    "context",
    "query",
    "messages",
    "conversations",
)
CHAT_COLUMNS = {"system": TEXTS | ANY, "history": ANY, "tools": st.lists(CALL, max_size=2) | ANY}
SIDE = st.one_of(TEXTS, CHAT, TURNS, ANY)
OTHER = {"id": ANY, "text": TEXTS | ANY, "system_prompt": PLAIN, "raw_prompt": ANY, "": PLAIN}
FORMATS = {
    "pairs": {
        "chosen": SIDE,
        "rejected": SIDE,
        "margin": PLAIN,
        "probability": PLAIN,
        "weight": PLAIN,
        "chosen_score": PLAIN,
        "rejected_score": PLAIN,
    },
    "ranks": {
        "completions": st.lists(SIDE, max_size=3) | ANY,
        "ranks": st.lists(NUMBERS, max_size=3) | ANY,
        "scores": st.none() | st.lists(NUMBERS, min_size=2, max_size=2),
        "ratings": st.none() | st.lists(st.dictionaries(TEXTS, PLAIN), max_size=2),
    },
    "labels": {"completion": SIDE, "label": PLAIN | ANY},
    "ratings": {
        "completion": SIDE,
        "rating": PLAIN,
        "ratings": ANY | st.dictionaries(TEXTS, NUMBERS, min_size=1),
        "subset": ANY,
    },
    "sft": {"completion": SIDE, "output": TEXTS, "answer": ANY},
}


PROMPTS = (
    {"prompt": "Hi?"},
    {"prompt": [USER]},
    {"question": "Hi?"},
    {"messages": [USER]},
    {"context": "a", "query": "b"},
)
GOOD = {
    "pairs": [{**prompt, "chosen": "Yes.", "rejected": "No."} for prompt in PROMPTS]
    + [{"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}]}],
    "ranks": [{**prompt, "completions": ["a", "b", "c"], "ranks": [2, 1, 1]} for prompt in PROMPTS],
    "labels": [{**prompt, "completion": "Yes.", "label": True} for prompt in PROMPTS],
    "ratings": [{**prompt, "completion": "Yes.", "ratings": {"ann": 2, "bob": None}} for prompt in PROMPTS],
    "sft": [
        {"messages": [USER, ANSWER]},
        {"prompt": "Hi?", "completion": "Yes."},
        {"prompt": [USER], "completion": [ANSWER]},
        {"instruction": "Hi?", "output": "Yes."},
        {"query": "Hi?", "response": "Yes."},
        {"text": "The sky is blue"},
    ],
}


def rows_of(name: str) -> st.SearchStrategy[list[dict]]:
    """Rows of anything, and good rows with up to two columns changed or added, which get further."""
    sides = st.one_of(TEXTS, CHAT, TURNS, ANY)
    columns = {**dict.fromkeys(PROMPT_COLUMNS, sides), **CHAT_COLUMNS, **OTHER, **FORMATS[name]}
    required = {column: columns.pop(column) for column in list(FORMATS[name])[:2]}
    whole = st.fixed_dictionaries(required, optional=columns)
    change = st.one_of(*(st.tuples(st.just(k), v) for k, v in (columns | required).items()))
    near = st.builds(
        lambda row, changes: row | dict(changes), st.sampled_from(GOOD[name]), st.lists(change, max_size=2)
    )
    return st.lists(st.one_of(whole, near, near, near), min_size=1, max_size=4)


TOKENIZER = byte_tokenizer()
SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


def outcome(folder: pathlib.Path, text: str, name: str, on_bad_row: str) -> str:
    """What is said of the rows of a file, one line either way."""
    path = folder / "rows.jsonl"
    path.write_text(text, "utf-8")
    make = build if name == "sft" else build_preferences
    options = TokenizeOptions(max_length=200, on_bad_row=on_bad_row)
    try:
        data = make(str(path), TOKENIZER, options, cache_dir=folder, rejected_path=folder / "rejected.jsonl")
    except InputError as error:
        said = str(error)
        assert f"{path}, line " in said or "is left to train on" in said
    else:
        said = data.text()
        report = data.sources[0].report
        assert report.rows == len(text.splitlines())
        assert len(data) == report.rows - report.bad - report.dropped - (
            0 if name == "sft" else report.difference_cut
        )
    assert "\n" not in said and len(said) < 2000
    return said


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_counted_or_named(name):
    @settings(SETTINGS, max_examples=40)
    @given(rows_of(name))
    @example(
        [
            {
                "prompt": "Hi?",
                "chosen": 10**400,
                "rejected": {"a": ["b"]},
                "completions": [[], {}],
                "completion": "x",
                "label": [1],
            }
        ]
    )
    def check(rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with tempfile.TemporaryDirectory() as folder:
            for on_bad_row in ("stop", "skip"):
                outcome(pathlib.Path(folder), text, name, on_bad_row)

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_no_text_of_a_row_is_lost(name):
    """A column with a text is named as unused, or the row is another (or none) without it, or the text stands in what
    was read all the same."""
    convert = to_conversation if name == "sft" else to_preference
    taken = 0

    @settings(SETTINGS, max_examples=100)
    @given(rows_of(name))
    def check(rows):
        nonlocal taken
        for row in rows:
            read = read_or_none(convert, row)
            if read is None:
                continue
            taken += 1
            shown = json.dumps(dataclasses.asdict(read))
            for column in row:
                said = [json.dumps(text)[1:-1] for text in texts_in(row[column])]
                if said and column not in read.unused and not all(text in shown for text in said):
                    rest = {name: value for name, value in row.items() if name != column}
                    assert read_or_none(convert, rest) != read

    check()
    assert taken > 50, "nearly all rows were refused, so this shows nothing"


def read_or_none(convert, row):
    try:
        return convert(row)
    except RowError:
        return None
