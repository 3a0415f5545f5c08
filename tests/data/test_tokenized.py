"""The cached build: counts, truncation, bad rows, the key, and two processes at once."""

from __future__ import annotations

import copy
import datetime
import json
import multiprocessing
import os
import pathlib
import shutil

import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.data.rows import ColumnNames
from posttrain_jax.data.tokenized import TokenizeOptions, build

from .chats import TEMPLATES, chat_row

GOOD = chat_row("hi", "hello there")
LONG = chat_row("hi", "word " * 100)
LONG_QUESTION = chat_row("word " * 100, "ok")


@pytest.fixture
def make(smollm2, tmp_path):
    """A function that builds with its own cache."""

    def make(spec, **options):
        return build(spec, smollm2, TokenizeOptions(**options), cache_dir=tmp_path / "cache")

    return make


def entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "tokenized").iterdir())


def test_columns_that_are_not_used_are_counted_and_said(make, write_jsonl):
    rows = [{**GOOD, "id": i, "source": "s", "note": None} for i in range(3)] + [{**GOOD, "note": "n"}]
    assert make(write_jsonl(*rows)).text().endswith("columns not used: id, source (3 rows); note (1 row)")
    rows = [{**row, "context": "c"} for row in rows]
    with pytest.raises(InputError, match=r"line 1, context: could be part of .*data\.ignore_columns=context"):
        make(write_jsonl(*rows))
    assert len(make(write_jsonl(*rows), columns=ColumnNames(ignored="context,id"))) == 4


def test_a_prompt_that_is_said_twice_is_counted(make, write_jsonl):
    row = {"prompt": "The sky is", "completion": "The sky is blue"}
    assert "1 repeated the prompt in the completion (taken once)" in make(write_jsonl(row)).text()


def test_counts_and_row_ids(make, write_jsonl, smollm2):
    path = write_jsonl(GOOD, LONG, GOOD, LONG_QUESTION)
    data = make(path, max_length=64)
    (source,) = data.sources
    report = source.report
    assert (report.rows, report.sequences, report.bad, report.dropped) == (4, 3, 0, 1)
    assert (report.duplicates, report.truncated) == (1, 1)
    assert report.tokens == source.lengths.sum() == len(source.store.tokens)
    assert report.trained_tokens == sum(int(source.sequence(i).loss_mask.sum()) for i in range(3))
    assert [source.row_id(i) for i in range(3)] == [f"{path}:1", f"{path}:2", f"{path}:3"]
    assert smollm2.decode(source.sequence(0).tokens).endswith("hello there<|im_end|>\n")
    for part in ("4 rows -> 3 sequences", "1 cut to max_length", "1 dropped", "1 duplicates (kept)"):
        assert part in data.text()


def test_arrays_are_memory_mapped(make, write_jsonl):
    store = make(write_jsonl(GOOD)).sources[0].store
    assert isinstance(store.tokens, np.memmap) and not store.tokens.flags.writeable
    assert (store.tokens.dtype, store.loss_mask.dtype, store.offsets.dtype) == (np.int32, np.bool_, np.int64)


@pytest.mark.parametrize(("truncate", "lengths"), [("right", [64]), ("drop", [])])
def test_truncation(truncate, lengths, make, write_jsonl):
    short = make(write_jsonl(GOOD), max_length=64).sources[0].lengths.tolist()
    data = make(write_jsonl(GOOD, LONG, name="long.jsonl"), max_length=64, truncate=truncate)
    assert data.sources[0].lengths.tolist() == short + lengths
    assert data.sources[0].sequence(0).loss_mask.any()


def test_an_over_long_row_can_be_an_error(make, write_jsonl):
    path = write_jsonl(GOOD, LONG)
    with pytest.raises(InputError, match=rf"{path}, line 2.* has \d+ tokens, more than data.max_length=64"):
        make(path, max_length=64, truncate="error")


def test_last_turn(make, write_jsonl):
    path = write_jsonl(chat_row("a", "b", "c", "d"))
    trained = [make(path, train_on=on).sources[0].report.trained_tokens for on in ("all_turns", "last_turn")]
    assert trained == [4, 2]


# ---- bad rows

NULL = {"messages": [{"role": "user", "content": None}]}


def test_bad_rows_stop_with_the_first_and_how_many_more(make, write_jsonl):
    path = write_jsonl(GOOD, NULL, {"text": 7}, {"messages": []})
    with pytest.raises(InputError) as error:
        make(path)
    assert (
        f"{path}, line 2, messages[0].content: is null (2 more bad rows: 1 in text, 1 in messages); fix"
        in str(error.value)
    )
    with pytest.raises(InputError, match=r"is null \(2 more"):  # from the cache, too
        make(path)


def test_bad_rows_can_be_skipped(smollm2, write_jsonl, tmp_path):
    path = write_jsonl(GOOD, NULL, {"text": 7}, GOOD)
    with open(path, "ab") as file:
        file.write(b'{"text": "\xff"}\n{"text": \n')
    rejected = tmp_path / "work" / "rejected.jsonl"
    for _ in range(2):  # built, then from the cache
        options = TokenizeOptions(on_bad_row="skip")
        data = build(path, smollm2, options, cache_dir=tmp_path / "cache", rejected_path=rejected)
        assert data.sources[0].report.bad == 4
        assert [data.sources[0].row_id(i) for i in range(2)] == [f"{path}:1", f"{path}:4"]
        records = [json.loads(line) for line in rejected.read_text(encoding="utf-8").splitlines()]
        assert [(record["source"], record["line"], record["column"]) for record in records] == [
            (path, 2, "messages[0].content"),
            (path, 3, "text"),
            (path, 5, "(encoding)"),
            (path, 6, "(json)"),
        ]
        assert records[0]["row"] == NULL and records[1]["reason"] == "is a number, not text"
        rejected.unlink()
    with pytest.raises(InputError, match="line 2"):  # the cached copy does not hide them from a strict run
        build(path, smollm2, cache_dir=tmp_path / "cache")


def test_an_old_rejected_file_does_not_stay(smollm2, write_jsonl, tmp_path):
    rejected = tmp_path / "rejected.jsonl"
    rejected.write_text("{}\n")
    build(
        write_jsonl(GOOD),
        smollm2,
        TokenizeOptions(on_bad_row="skip"),
        cache_dir=tmp_path,
        rejected_path=rejected,
    )
    assert not rejected.exists()


def test_a_template_that_refuses_makes_a_bad_row(make, write_jsonl):
    path = write_jsonl(GOOD, {"messages": [{"role": "user", "content": "a"}, *GOOD["messages"]]})
    with pytest.raises(InputError, match="line 2.*must alternate"):
        make(path, chat=ChatOptions(template=str(TEMPLATES / "alternating.jinja")))


def test_nothing_left_to_train_on(make, write_jsonl):
    with pytest.raises(InputError, match="no row is left .* raise data.max_length"):
        make(write_jsonl(LONG_QUESTION), max_length=32)
    with pytest.raises(InputError, match="no row is left"):
        make(write_jsonl(NULL, name="bad.jsonl"), on_bad_row="skip")


@pytest.mark.parametrize("make_file", [lambda path: None, lambda path: path.touch()])
def test_missing_and_empty_files_leave_nothing_in_the_cache(make_file, make, tmp_path):
    make_file(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl"):
        make(str(tmp_path / "rows.jsonl"))
    cache = tmp_path / "cache" / "tokenized"
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"truncate": "left"},
        {"train_on": "all"},
        {"on_bad_row": "ignore"},
        {"max_length": 1},
        {"max_length": -1},
    ],
)
def test_bad_options(options):
    with pytest.raises(InputError, match=next(iter(options))):
        TokenizeOptions(**options)


# ---- the cache


def test_what_the_key_depends_on(make, smollm2, write_jsonl, tmp_path):
    path = write_jsonl(GOOD)
    make(path, max_length=64)
    assert len(entries(tmp_path)) == 1
    make(path, max_length=64, on_bad_row="skip")  # decides nothing about good rows
    os.utime(path, (1, 1))  # contents count, not times
    make(path, max_length=64)
    assert len(entries(tmp_path)) == 1
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    for options in (
        {"max_length": 65},
        {"max_length": 64, "train_on": "last_turn"},
        {"chat": ChatOptions(template=template)},
    ):
        before = len(entries(tmp_path))
        make(path, **options)
        assert len(entries(tmp_path)) == before + 1
    pathlib.Path(path).write_text(json.dumps(LONG) + "\n")
    assert make(path, max_length=64).sources[0].report.truncated == 1
    other = copy.deepcopy(smollm2)
    other.add_tokens(["hello there"])
    before = len(entries(tmp_path))
    build(path, other, TokenizeOptions(max_length=64), cache_dir=tmp_path / "cache")
    assert len(entries(tmp_path)) == before + 1


def test_a_cached_build_is_read_back(make, write_jsonl, tmp_path):
    """The second build leaves the folder of the first as it is."""
    path = write_jsonl(GOOD)
    make(path)
    (name,) = entries(tmp_path)
    before = (tmp_path / "cache" / "tokenized" / name).stat()
    make(path)
    after = (tmp_path / "cache" / "tokenized" / name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_changed_entry_is_built_again_and_said(make, write_jsonl, tmp_path, caplog):
    path = write_jsonl(GOOD)
    expected = make(path).sources[0].sequence(0).tokens.tolist()
    (name,) = entries(tmp_path)
    np.load(tmp_path / "cache" / "tokenized" / name / "tokens.npy", mmap_mode="r+")[0] = 4711
    assert make(path).sources[0].sequence(0).tokens.tolist() == expected
    assert "tokens.npy has changed); it is made again" in caplog.text


def test_a_damaged_entry_is_built_again(make, write_jsonl, tmp_path):
    path = write_jsonl(GOOD)
    expected = make(path).sources[0].sequence(0).tokens.tolist()
    (name,) = entries(tmp_path)
    tokens = tmp_path / "cache" / "tokenized" / name / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-8])
    assert make(path).sources[0].sequence(0).tokens.tolist() == expected
    assert entries(tmp_path) == [name]


def test_library_sources_are_keyed_by_their_rows(smollm2, tmp_path):
    datasets = pytest.importorskip("datasets")
    for text in ("one", "two"):
        datasets.Dataset.from_list([{"text": text}]).save_to_disk(str(tmp_path / "saved"))
        data = build(str(tmp_path / "saved"), smollm2, cache_dir=tmp_path / "cache")
        assert smollm2.decode(data.sources[0].sequence(0).tokens) == f"{text}<|im_end|>"


def _build_in_child(path, gguf, cache, barrier, results):
    from posttrain_jax.models.io.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(gguf)
    barrier.wait(timeout=120)
    data = build(path, tokenizer, TokenizeOptions(max_length=256), cache_dir=cache)
    results.put(int(data.sources[0].store.tokens.astype(np.int64).sum()))


@pytest.mark.slow
@pytest.mark.alone
def test_two_processes_at_once(smollm2_gguf, alpaca_path, smollm2, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (str(alpaca_path), smollm2_gguf, tmp_path / "cache", barrier, results)
    children = [context.Process(target=_build_in_child, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    sums = {results.get(timeout=240) for _ in children}
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert len(sums) == 1
    assert len(entries(tmp_path)) == 1
    data = build(str(alpaca_path), smollm2, TokenizeOptions(max_length=256), cache_dir=tmp_path / "other")
    assert int(data.sources[0].store.tokens.astype(np.int64).sum()) in sums


def test_a_mixture_is_built_source_by_source(make, write_jsonl):
    a, b = (
        write_jsonl(GOOD, name="a.jsonl"),
        write_jsonl({"text": "plain"}, {"text": "words"}, name="b.jsonl"),
    )
    data = make([(a, 3.0), (b, 1.0)])
    assert [(len(source), source.weight) for source in data.sources] == [(1, 3.0), (2, 1.0)]
    assert len(data) == 3 and len(data.text().splitlines()) == 2


def test_turns_that_lose_their_thoughts_are_counted(make, write_jsonl):
    """Qwen3's template drops the thoughts of the answers before the last question."""
    thinking = [
        {"role": "user", "content": "6*7?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n42"},
    ]
    plain = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "that is all"}]
    path = write_jsonl({"messages": thinking + thinking}, {"messages": plain + plain})
    data = make(path, chat=ChatOptions(template=str(TEMPLATES / "qwen3.jinja")))
    assert data.sources[0].report.untrained_turns == 1
    assert "; 1 turns not trained, because the chat template does not show them" in data.text()


def test_the_date_is_part_of_the_key_where_it_is_shown(make, write_jsonl, smollm2, tmp_path):
    """The rows of a run have one date, and the same date gives the same tokens in an empty cache."""
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    dated = "{{ strftime_now('%H:%M:%S') }}" + turns
    path, first = write_jsonl(GOOD), datetime.datetime(2024, 7, 26, 13, 5)

    def tokens(**options):
        return make(path, chat=ChatOptions(**options)).sources[0].sequence(0).tokens.tolist()

    at_first = tokens(template=dated, now=first)
    assert smollm2.decode(at_first).startswith("13:05:00")
    assert tokens(template=dated, now=first + datetime.timedelta(seconds=1)) != at_first
    assert tokens(template=dated, now=first) == at_first
    before = len(entries(tmp_path))
    shutil.rmtree(tmp_path / "cache")
    assert tokens(template=dated, now=first) == at_first
    assert len(entries(tmp_path)) == before - 1
    tokens(now=first)
    tokens(now=first + datetime.timedelta(days=1))  # ChatML shows no date
    assert len(entries(tmp_path)) == before
