"""Held-out sequences: deterministic, of the size asked for, and duplicates on one side."""

from __future__ import annotations

import json

import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.split import hold_out, split_amount, trained_rows
from posttrain_jax.data.tokenized import TokenizeOptions, build
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def data(smollm2, tmp_path_factory):
    """Two sources: 60 rows of which 20 come three times, and 20 of those same rows again."""
    folder = tmp_path_factory.mktemp("split")
    for name, numbers in (("a", [*range(20), *range(20), *range(20)]), ("b", [*range(10), *range(100, 130)])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in numbers)
        )
    spec = [(str(folder / "a.jsonl"), 1.0), (str(folder / "b.jsonl"), 1.0)]
    return build(spec, smollm2, TokenizeOptions(), cache_dir=folder)


def contents(data):
    return [source.sequence(i).tokens.tobytes() for source in data.sources for i in range(len(source))]


def row_ids(data):
    return {source.row_id(i) for source in data.sources for i in range(len(source))}


@pytest.mark.parametrize(("amount", "low", "high"), [(0.3, 27, 30), (10, 7, 10)])
def test_size_and_sides(amount, low, high, data):
    train, held = hold_out(data, amount, seed=0)
    assert len(train) + len(held) == len(data) == 100
    assert low <= len(held) <= high
    assert not set(contents(train)) & set(contents(held))
    assert row_ids(train) | row_ids(held) == row_ids(data) and not row_ids(train) & row_ids(held)


def test_seed_decides(data):
    first, again, other = (row_ids(hold_out(data, 0.2, seed=seed)[1]) for seed in (0, 0, 1))
    assert first == again != other


def test_nothing_left(data):
    with pytest.raises(InputError, match=r"would hold out all \d+ .*data.eval=split:0.1"):
        hold_out(data, 100, seed=0)


def test_nothing_held(smollm2, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "same"}\n' * 5)
    with pytest.raises(InputError, match="holds out none"):
        hold_out(build(str(path), smollm2, cache_dir=tmp_path), 2, seed=0)


def test_held_out_rows_that_are_trained_are_counted(data, smollm2, tmp_path):
    """Rows 18, 19, 20 and 18 again, of which the training data have 18 and 19: three. A file of its own rows: none."""
    counts = []
    for name, numbers in (("some", [18, 19, 20, 18]), ("none", [500, 501])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in numbers))
        counts.append(trained_rows(data, build(str(path), smollm2, TokenizeOptions(), cache_dir=tmp_path)))
    assert counts == [3, 0]


def test_a_preference_is_its_prompt_with_all_its_completions(tmp_path):
    """The same pair, and the same pair the other way round, are training rows; another answer to the prompt is not."""

    def preferences(name, pairs):
        rows = [{"prompt": "Why?", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return build_preferences(str(tmp_path / name), byte_tokenizer(), cache_dir=tmp_path)

    train = preferences("train.jsonl", [(" a", " b"), (" c", " d")])
    held = preferences("held.jsonl", [(" a", " b"), (" d", " c"), (" a", " d")])
    assert trained_rows(train, held) == 2


def test_specs():
    assert split_amount("split:0.05") == 0.05
    assert split_amount("split:200") == 200
    assert split_amount("eval.jsonl") is None
    assert split_amount([("a", 1.0)]) is None
    for bad in (
        "split:",
        "split:0",
        "split:-1",
        "split:1.5",
        "split:x",
        "split:nan",
        "split:inf",
        "split:1e400",
    ):
        with pytest.raises(InputError):
            split_amount(bad)
