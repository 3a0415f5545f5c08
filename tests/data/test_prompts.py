"""Prompts as rows, by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.loader import Loader
from posttrain_jax.data.prompts import read_prompts
from posttrain_jax.data.rows import ColumnNames
from posttrain_jax.data.sources import RowError
from posttrain_jax.data.split import hold_out


def encode(row) -> np.ndarray:
    """A token for each character."""
    if not isinstance(row.get("prompt"), str):
        raise RowError("prompt", "is missing")
    return np.asarray([ord(letter) for letter in row["prompt"]], np.int32)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_places_and_what_travels_with_them(tmp_path):
    spec = write(tmp_path / "p.jsonl", [{"prompt": "ab", "answer": 3}, {"prompt": "c"}])
    data = read_prompts(spec, encode, max_tokens=4)
    assert len(data) == 2 and data.text() == "p.jsonl: 2 prompts of 1 to 2 tokens."
    (rows,) = data.sources
    assert rows.collate([rows[1], None])["places"].tolist() == [[0, 1], [-1, -1]]
    prompt = data.at((0, 0))
    assert (prompt.tokens.tolist(), prompt.row["answer"], prompt.row_id) == ([97, 98], 3, f"{spec}:1")


def test_columns_that_are_left_out_do_not_travel(tmp_path):
    spec = write(tmp_path / "p.jsonl", [{"prompt": "ab", "answer": 3, "note": "x"}, {"prompt": "c"}])
    prompts = read_prompts(spec, encode, max_tokens=4, columns=ColumnNames(ignored="answer,note")).all()
    assert [prompt.row for prompt in prompts] == [{"prompt": "ab"}, {"prompt": "c"}]


def test_the_loader_gives_every_prompt_once_an_epoch_and_resumes(tmp_path):
    spec = write(tmp_path / "p.jsonl", [{"prompt": letter} for letter in "abcdef"])
    data = read_prompts(spec, encode, max_tokens=4)
    loader = Loader(data.sources, rows_per_step=2, seed=1)
    first = [tuple(map(tuple, next(loader).arrays["places"].tolist())) for _ in range(6)]
    assert sorted(place for batch in first[:3] for place in batch) == [(0, row) for row in range(6)]
    loader.close()
    again = Loader(data.sources, rows_per_step=2, seed=1)
    again.set_state({**again.get_state(), "rows": 8})
    assert tuple(map(tuple, next(again).arrays["places"].tolist())) == first[4]
    again.close()


def test_the_loader_does_not_resume_with_other_answers(tmp_path):
    """The columns beside a prompt decide its rewards."""
    states = []
    for answer in (3, 4):
        spec = write(tmp_path / "p.jsonl", [{"prompt": "ab", "answer": answer}])
        loader = Loader(read_prompts(spec, encode, max_tokens=4).sources, rows_per_step=1, seed=1)
        states.append(loader.get_state())
        if answer == 4:
            with pytest.raises(InputError, match="is not what the checkpoint was trained on"):
                loader.set_state(states[0])
        loader.close()


def test_equal_prompts_are_held_out_together(tmp_path):
    spec = write(tmp_path / "p.jsonl", [{"prompt": letter} for letter in "aabbccddee"])
    train, held_out = hold_out(read_prompts(spec, encode, max_tokens=4), 4, seed=0)
    kept = {prompt.row["prompt"] for prompt in train.all()}
    out = [prompt.row["prompt"] for prompt in held_out.all()]
    assert len(out) == 4 and len(set(out)) == 2 and not kept & set(out)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"prompt": "abcde"}], {}, r"p\.jsonl:1: the prompt has 5 tokens, more than 4; .*long_prompts=drop"),
        ([{"prompt": "abcde"}], {"long_prompts": "drop"}, "holds no prompt of at most 4 tokens"),
        ([{"prompt": ""}], {}, r"p\.jsonl:1: prompt: has no tokens"),
        ([{"prompt": "a"}, {"text": "b"}], {}, r"p\.jsonl:2: prompt: is missing; .*on_bad_row=skip"),
        ([{"prompt": "a"}], {"long_prompts": "cut"}, "data.long_prompts is 'cut'; use error or drop"),
    ],
)
def test_bad_prompts_are_one_sentence(tmp_path, rows, options, words):
    with pytest.raises(InputError, match=words):
        read_prompts(write(tmp_path / "p.jsonl", rows), encode, max_tokens=4, **options)


def test_what_is_left_out_is_counted(tmp_path):
    spec = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "abcde"}, {"x": 1}])
    rejected = tmp_path / "rejected.jsonl"
    data = read_prompts(
        spec, encode, max_tokens=4, long_prompts="drop", on_bad_row="skip", rejected_path=rejected
    )
    (line,) = map(json.loads, rejected.read_text().splitlines())
    assert (line["line"], line["row"], line["reason"]) == (3, {"x": 1}, "is missing")
    assert data.text() == "p.jsonl: 1 prompts of 1 to 1 tokens, 1 dropped (too long), 1 bad rows skipped."
