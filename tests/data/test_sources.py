"""Rows from files, folders, `datasets` and TFDS; each knows its file and line."""

from __future__ import annotations

import json
import math
import os
import pathlib
import random

import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.formats import to_conversation
from posttrain_jax.data.rows import RowError
from posttrain_jax.data.sources import read_rows, source_files, weighted_sources

ROWS = [{"text": "one"}, {"text": "zwei ü"}, {"text": "三"}]


def rows_of(source: object) -> list[tuple[dict, int]]:
    return [(row.value, row.line) for row in read_rows(str(source)) if row.error is None]


def errors_of(source: object) -> list[tuple[int, str]]:
    return [(row.line, str(row.error)) for row in read_rows(str(source)) if row.error is not None]


def test_jsonl_lines_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n\n{"text": "two"}')
    assert rows_of(path) == [({"text": "one"}, 1), ({"text": "two"}, 3)]
    assert [row.source for row in read_rows(str(path))] == [str(path)] * 2


def test_line_separators_inside_a_line_do_not_split_it(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be"
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"text": text}, ensure_ascii=False) + "\n" + '{"text": "x"}\n', encoding="utf-8"
    )
    assert rows_of(path) == [({"text": text}, 1), ({"text": "x"}, 2)]


def test_bom_only_at_the_start(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    assert rows_of(path) == [({"text": "a"}, 1)]
    ((line, reason),) = errors_of(path)
    assert line == 2 and "BOM" in reason


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', 27),  # Latin-1, second line
        (b'\xef\xbb\xbf{"text": "\xff"}\n', 13),  # after a BOM
    ],
)
def test_wrong_encoding_names_the_byte(data, offset, tmp_path):
    assert data[offset] in (0xE9, 0xFF)
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    ((_, reason),) = errors_of(path)
    assert f"byte offset {offset} " in reason and f"0x{data[offset]:02x}" in reason


def test_utf16_is_recognized(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-16")
    assert "UTF-16" in errors_of(path)[0][1]


def test_broken_json_names_line_and_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n[1]\n')
    assert rows_of(path) == [({"text": "a"}, 1)]
    (second, third) = errors_of(path)
    assert second[0] == 2 and "(json): is broken at character 11" in second[1]
    assert third == (3, "(json): is a list, not an object with columns")


def test_half_a_surrogate_pair(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\uD83D"}\n')
    assert rows_of(path) == [({"text": "\U0001f600"}, 1)]
    assert errors_of(path) == [
        (2, "(json): holds \\ud83d, one half of a surrogate pair, which is no character")
    ]


def test_json_array_knows_the_line_of_each_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '\ufeff[\n  {"text": "one"},\n  {"text":\n "two"}, {"text": "three"}\n, 7, {"text": "four"}]\n'
    )
    assert rows_of(path) == [
        ({"text": "one"}, 2),
        ({"text": "two"}, 3),
        ({"text": "three"}, 4),
        ({"text": "four"}, 5),
    ]
    assert errors_of(path) == [(5, "(json): is a int, not an object with columns")]


def test_json_lines_in_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert rows_of(path) == [(row, i) for i, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize(
    ("text", "line"),
    [('[{"text": "a"},\n{"text": }]', 2), ('[{"text": "a"}\n{"text": "b"}]', 2), ('[{"text": "a"},', 1)],
)
def test_broken_json_array(text, line, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    rows = read_rows(str(path))
    assert next(rows).value == {"text": "a"}
    with pytest.raises(
        InputError, match=f"{path}, line {line} is broken at column .*nothing after it can be"
    ):
        next(rows)


def test_text_blocks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first\nstill first\n\n  \nsecond\n", encoding="utf-8")
    assert rows_of(path) == [({"text": "first\nstill first"}, 1), ({"text": "second"}, 5)]


def test_a_broken_line_takes_its_whole_text_block_along(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"first\n\nhalf\n\xff\nrest \xfe\nrest\n\nlast\n\n\xff alone")
    assert [(row.value, row.line) for row in read_rows(str(path)) if row.error is None] == [
        ({"text": "first"}, 1),
        ({"text": "last"}, 8),
    ]
    found = errors_of(path)
    assert [line for line, _ in found] == [4, 10]
    assert "0xff at byte offset 12" in found[0][1]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert rows_of(path) == [(row, i) for i, row in enumerate(ROWS, 1)]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        rows_of(path)


def test_folder_of_files_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "README.md").write_text("no data\n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.jsonl").write_text("{}\n")
    assert rows_of(tmp_path) == [({"text": "a"}, 1), ({"text": "b"}, 1)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "does not exist"),
        ("empty.jsonl", "is empty"),
        ("blank.jsonl", "is empty"),
        ("empty.json", "is empty"),
        ("empty_array.json", "is empty"),
        ("empty.txt", "is empty"),
        ("rows.xlsx", "must end in one of"),
        ("empty_folder", "holds no file"),
    ],
)
def test_sources_that_hold_nothing(name, message, tmp_path):
    for empty in ("empty.jsonl", "empty.json", "empty.txt"):
        (tmp_path / empty).touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "empty_array.json").write_text("[]")
    (tmp_path / "rows.xlsx").write_text("text\na\n")
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(InputError, match=message) as error:
        list(read_rows(str(tmp_path / name)))
    assert name in str(error.value)


def test_weights():
    assert weighted_sources("a.jsonl") == [("a.jsonl", 1.0)]
    assert weighted_sources([("a", 2), ("b", 0.5)]) == [("a", 2.0), ("b", 0.5)]
    bad_weights = [0, -1, math.nan, math.inf, 10**400, "x", None]
    for bad in ([], *([("a", weight)] for weight in bad_weights), ["a", "b"], [("a", 1, 2)], [7], [{}]):
        with pytest.raises(InputError):
            weighted_sources(bad)


def test_an_empty_source_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert len(rows_of(".")) == 1
    for empty in ("", " "):
        with pytest.raises(InputError, match="a data source is empty"):
            rows_of(empty)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in (
        ("pipe.jsonl", "is no regular file"),
        (".", "pipe.jsonl is no regular file"),
        ("x" * 300 + ".jsonl", "cannot be read: File name too long"),
        ("a\0b.jsonl", "does not exist|is no path"),
        ("y" * 5000, "File name too long"),
    ):
        with pytest.raises(InputError, match=message) as error:
            rows_of(tmp_path / name)
        assert len(str(error.value)) < 700 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a", "text": "b"}', "has the key 'text' twice"),
        ('{"messages": [{"role": "user", "role": "assistant"}]}', "has the key 'role' twice"),
        ('{"text": "a", "n": -' + "9" * 5000 + "}", "holds an integer of 5,001 digits"),
        ('{"text": "a", "n": ' + "[" * 150 + "]" * 150 + "}", "is nested too deeply"),
        ('{"text": "a", "n": ' + "[" * 200_000 + "]" * 200_000 + "}", "is nested too deeply"),
        ('{"text": "\\ud83d"}', "one half of a surrogate pair"),
        ('{"text": "a"} {"text": "b"}', "Extra data"),
        ('"' + "x" * 10**6 + '"', "is a str, not an object"),
        ('{"' + "k" * 10**6 + '": 1, "' + "k" * 10**6 + '": 2}', "twice in one object"),
    ],
)
def test_json_that_would_lose_something_is_an_error_of_its_row(line, reason, tmp_path):
    """In JSON Lines and in an array, where the next row is read, but after one that is too deep to parse."""
    lines, array = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines.write_text(f'{line}\n{{"text": "next"}}\n')
    array.write_text(f'[{line.replace("} {", "}, {")},\n{{"text": "next"}}]')
    ((where, said),) = errors_of(lines)
    assert where == 1 and reason in said and len(said) < 600
    assert rows_of(lines) == [({"text": "next"}, 2)]
    if line.count("[") > 10**5:
        with pytest.raises(InputError, match="line 1 is nested too deeply; nothing after it can be read"):
            errors_of(array)
    elif reason != "Extra data":
        ((where, said),) = errors_of(array)
        assert where == 1 and reason in said and len(said) < 600
        assert rows_of(array) == [({"text": "next"}, 2)]


NESTED = [
    {
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "tool_calls": [{"name": "f", "arguments": {"city": "Oslo", "days": [{"n": 1}, {"m": None}]}}],
            },
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"name": "g", "arguments": {}}], "weight": 1},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": "a",
                "tool_calls": [
                    {"name": "h", "arguments": {"deep": {"a": [[{"x": 1}], []], "list": [1, None]}}}
                ],
            },
        ]
    },
]


@pytest.mark.parametrize("kind", ["parquet", "saved", "hf"])
def test_nested_columns_are_those_of_json_lines(kind, tmp_path, monkeypatch):
    """Arrow gives all objects of a column all keys. A null that somebody wrote (the "m" of the first row) is lost with
    those that Arrow put there; one in a list stays."""
    datasets = pytest.importorskip("datasets")
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = str(tmp_path / "a.parquet")
    pq.write_table(datasets.Dataset.from_list(NESTED).data.table, source)
    if kind == "saved":
        source = str(tmp_path / "saved")
        datasets.Dataset.from_list(NESTED).save_to_disk(source)
    elif kind == "hf":
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NESTED))
        source = f"hf:{tmp_path / 'plain'}"
    expected = json.loads(json.dumps(NESTED).replace(', {"m": null}', ", {}"))
    assert [value for value, _ in rows_of(source)] == expected
    assert [to_conversation(value) for value, _ in rows_of(source)] == [
        to_conversation(row) for row in expected
    ]


def test_parquet_with_flipped_bytes(tmp_path):
    """Rows, or one line that names the file; Arrow says what is wrong with a dozen kinds of exceptions."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(NESTED), path, write_page_checksum=True)
    whole = path.read_bytes()
    drawn, said = random.Random(0), []
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[drawn.randrange(len(whole))] ^= 1 << drawn.randrange(8)
        path.write_bytes(damaged)
        try:
            rows = list(read_rows(str(path)))
        except InputError as error:
            said.append(str(error))
        else:
            assert len(rows) <= 3
    assert len(said) > 50
    assert all(str(path) in line and "\n" not in line and len(line) < 700 for line in said)


def test_huggingface_folder_and_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(saved))
    expected = [(row, i) for i, row in enumerate(ROWS, 1)]
    assert source_files(str(saved)) is None
    assert rows_of(saved) == expected
    assert rows_of(f"hf:{saved}?max_rows=2") == expected[:2]

    splits = tmp_path / "splits"
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(splits))
    assert rows_of(f"hf:{splits}?split=test") == expected[:1]
    assert rows_of(splits) == expected
    with pytest.raises(InputError, match="could not be opened"):
        rows_of(f"hf:{splits}?split=gone")


@pytest.mark.parametrize("query", ["split=train", "split=train&streaming=1", "streaming=1&max_rows=2"])
def test_huggingface_dataset_by_name(query, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = rows_of(f"hf:{folder}?{query}")
    assert rows == [(row, i) for i, row in enumerate(ROWS, 1)][: 2 if "max_rows" in query else 3]
    first = next(iter(read_rows(f"hf:{folder}?{query}")))
    assert first.source == f"hf:{folder}?{query}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:name?splits=train", "unknown option 'splits'"),
        ("hf:name?streaming=yes", "streaming is 0 or 1"),
        ("hf:name?max_rows=-1", "positive whole number"),
        ("hf:", "names no dataset"),
        ("hf:./no_such_folder_here", "could not be opened"),
        ("tfds:name?config=a", "unknown option 'config'"),
        ("tfds:no_such_dataset_here", "could not be opened"),
    ],
)
def test_bad_library_specs(source, message, tmp_path):
    if source.startswith("tfds:"):
        pytest.importorskip("importlib_resources", reason="tensorflow-datasets needs it without declaring it")
    with pytest.raises(InputError, match=message):
        list(read_rows(source))


def test_tfds(tmp_path: pathlib.Path):
    """A tiny dataset prepared here in ArrayRecord format and read back without a TensorFlow graph."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources", reason="tensorflow-datasets needs it without declaring it")

    messages = {"role": tfds.features.Text(), "content": tfds.features.Text()}

    class TinyChat(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        name = "tiny_chat"

        def _info(self):
            features = tfds.features.FeaturesDict({"messages": tfds.features.Sequence(messages)})
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                turns = [{"role": "user", "content": f"é{i}"}, {"role": "assistant", "content": "ok"}]
                yield i, {"messages": turns}

    TinyChat(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    rows = [row.value for row in read_rows(f"tfds:tiny_chat?data_dir={tmp_path}")]
    contents = {to_conversation(row).messages[0]["content"] for row in rows}
    assert contents == {"é0", "é1", "é2"}


def test_bytes_of_parquet_are_text_where_they_can_be(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [{"text": "é".encode(), "image": b"\xff\xd8"}, {"text": b"\xff", "image": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    ((first, _), (second, _)) = rows_of(path)
    assert first == {"text": "é", "image": b"\xff\xd8"}
    with pytest.raises(RowError, match="image: could be part of the prompt"):
        to_conversation(first)
    with pytest.raises(RowError, match="text: is bytes that are not UTF-8, not text"):
        to_conversation(second)
