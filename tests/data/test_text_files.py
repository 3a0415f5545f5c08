"""The same rows as JSON Lines, JSON over several lines, CSV and with gzip; and columns under other names."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pathlib
import tempfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.formats import to_conversation
from posttrain_jax.data.preferences import to_preference
from posttrain_jax.data.rows import ColumnNames, read_columns
from posttrain_jax.data.sources import read_rows
from posttrain_jax.data.tokenized import TokenizeOptions, build
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer

SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


def rows_of(path: object, columns: ColumnNames = ColumnNames()) -> list[dict]:  # noqa: B008
    rows = list(read_rows(str(path), columns))
    assert [str(row.error) for row in rows if row.error] == []
    return [row.value for row in rows]


def error_of(path: object, columns: ColumnNames = ColumnNames()) -> tuple[int, str]:  # noqa: B008
    """The only row that cannot be read: its line and why."""
    ((line, error),) = [(row.line, row.error) for row in read_rows(str(path), columns) if row.error]
    return line, str(error)


def csv_text(rows: list[dict], **options) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), **options)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
NAME = st.text("abcdefg_ é,;\"'", min_size=1, max_size=5).map(lambda name: f"c{name}x")


@given(
    st.lists(NAME, unique=True, min_size=2, max_size=4).flatmap(
        lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(names, TEXT)), min_size=1, max_size=4)
    )
)
@example([{"prompt": '5" disk, 3', "x": 'a\nb"c'}, {"prompt": "=1+1", "x": "\u2028\x85\x0c"}])
@settings(SETTINGS, max_examples=60)
def test_every_kind_of_file_holds_the_same_rows(rows):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        texts = {
            "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            "b.json": json.dumps(rows, indent=2, ensure_ascii=False),
            "c.json": "\n".join(json.dumps(row, indent=1) for row in rows),
            "d.jsonl": "\n\n".join(json.dumps(row, indent=1) for row in rows),
            "e.csv": csv_text(rows),
            "f.tsv": csv_text(rows, dialect="excel-tab"),
            "g.CSV": csv_text(rows, quoting=csv.QUOTE_ALL, lineterminator="\n"),
        }
        for file, text in texts.items():
            (folder / file).write_bytes(text.encode())
            (folder / f"{file}.gz").write_bytes(gzip.compress(text.encode()))
            if "tsv" in file and any(
                mark in text for row in rows for text in row.values() for mark in "\t\n"
            ):
                continue  # there they end the cell
            if "csv" in file.lower() and "\r" in json.dumps(rows, ensure_ascii=False):
                continue  # a lone carriage return ends a row in some dialects; what is refused is below
            assert rows_of(folder / file) == rows, file
            assert rows_of(folder / f"{file}.gz") == rows, file


def test_lines_of_a_csv_and_what_its_cells_are(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        '\ufeff,prompt,completion,label,note\r\n0,"one\nline",yes,True,\r\n\r\n1,007,"[1, 2]",0,x\r\n',
        newline="",
    )
    rows = list(read_rows(str(path)))
    assert [row.line for row in rows] == [2, 5]
    assert [row.value for row in rows] == [
        {"index": "0", "prompt": "one\nline", "completion": "yes", "label": "True", "note": None},
        {"index": "1", "prompt": "007", "completion": "[1, 2]", "label": "0", "note": "x"},
    ]
    assert [to_preference(row.value).label for row in rows] == [True, False]


def test_a_tab_or_a_line_end_always_ends_a_cell_of_a_tsv(tmp_path):
    """GLUE's files have texts with single quotes; a reader of CSV makes one row of the first two."""
    path = tmp_path / "a.tsv"
    path.write_text('text\toutput\n"A fine film\tgood\nbad film"\tbad\r\n"a ""b"""\t"x"y"\n\n""\t"\n')
    assert rows_of(path) == [
        {"text": '"A fine film', "output": "good"},
        {"text": 'bad film"', "output": "bad"},
        {"text": 'a "b"', "output": '"x"y"'},
        {"text": None, "output": '"'},
    ]
    path.write_text('text\toutput\n"a\tb"\tx\n')
    assert error_of(path) == (2, "(csv): has 3 cells, and the header has 2: text, output")


def test_columns_without_a_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,,\na,b,,\n")
    assert rows_of(path) == [{"prompt": "a", "completion": "b"}]
    path.write_text("prompt,completion,,\na,b,,\nc,d,,e\n")
    assert error_of(path) == (
        3,
        "(csv): holds 'e' in cell 4, and the header has no name there; name the column",
    )


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("label", "True"),
        ("rating", "1.50"),
        ("history", "He was born in 1850."),
        ("scores", "[none]"),
        ("ratings", "4.50"),
        ("completion", '{"value": 42}'),
        ("completion", '[{"value": 42}]'),
        ("prompt", "{'role': 'a dict of Python'}"),
    ],
)
def test_cells_that_stay_text(column, cell, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(csv_text([{column: cell, "x": "y"}]), newline="")
    assert rows_of(path) == [{column: cell, "x": "y"}]


def test_chats_and_numbers_in_cells(tmp_path):
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": 'Yes, "yes".'}]
    path = tmp_path / "a.csv"
    path.write_text(csv_text([{"messages": json.dumps(messages), "tools": ""}]), newline="")
    (row,) = rows_of(path)
    assert list(to_conversation(row).messages) == messages
    path.write_text(
        csv_text(
            [
                {
                    "prompt": json.dumps(messages[:1]),
                    "chosen": "A",
                    "rejected": "B",
                    "margin": "better",
                    "weight": "0.5",
                }
            ]
        ),
        newline="",
    )
    (row,) = rows_of(path)
    preference = to_preference(row)
    assert preference.completions[0].messages[0] == messages[0]
    assert (preference.comparisons[0].weight, preference.comparisons[0].margin) == (0.5, 2 / 3)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a,b\n1,2\n1,2,3\n1,2\n", 3, "has 3 cells, and the header has 2: a, b"),
        ("a,b\n1\n1,2\n", 2, "has 1 cells"),
        (b"a,b\n1,caf\xe9\n1,2\n", 2, "b: holds the byte 0xe9, not UTF-8"),
        (
            "prompt,completion\n\"[{'role': 'user', 'content': 'x'}]\",y\n",
            2,
            "begins like JSON messages, but it is broken",
        ),
        ("messages\n[{'role': 'user'}]\n", 2, "messages: begins like JSON messages, but it is broken"),
    ],
)
def test_a_broken_csv_names_the_line(text, line, reason, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = error_of(path)
    assert found[0] == line and reason in found[1]


@pytest.mark.parametrize(
    ("name", "text", "line", "reason"),
    [
        ("a.csv", 'text,b\n1,"2\n3,4\n', 2, r"is broken \(unexpected end of data; a quote inside"),
        ("a.csv", 'text,b\n1,"2"x\n3,4\n', 2, r"is broken \(',' expected after '\"'"),
        ("a.csv", "a,a\n1,2\n", 1, "has the column 'a' twice"),
        ("a.csv", "a;b\n1;2\n", 1, "has the header .* something else than commas"),
        ("a.csv", "a,b\n".encode("utf-16"), 1, "has an error: byte 0xff .* UTF-16"),
        ("a.jsonl", '{\n "text": "a"\n}\n{\n "text": \n}\n{"text": "b"}\n', 6, "is broken at column 1"),
        ("a.json", '{\n "text": "a"\n}\n{\n "text": \n}\n{"text": "b"}]', 6, "is broken at column 1"),
        ("a.json", '{"text": "a"\n{"text": "b"}\n{"text": "c"}\n', 2, "is broken at column 1"),
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]\n', 2, "goes on after the array's end"),
        ("a.json", '[{"text": "a"},\n' + "[" * 200_000, 2, "is nested too deeply"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', 2, "has an error: byte 0xff at byte offset 26"),
    ],
)
def test_a_rest_that_cannot_be_read_is_never_skipped(name, text, line, reason, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    options = TokenizeOptions(on_bad_row="skip")
    with pytest.raises(InputError, match=f"{path}, line {line} {reason}.*; nothing after it can be read, so"):
        build(str(path), byte_tokenizer(), options, cache_dir=tmp_path, rejected_path=tmp_path / "rejected")


def test_a_gzip_file_that_is_cut_off_or_none(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(10_000)))
    for data, words in (
        (whole[: len(whole) // 2], "cut off or damaged"),
        (b"text", "Not a gzipped file"),
        (b"", "is empty"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=words) as error:
            rows_of(path)
        assert str(path) in str(error.value)
    (tmp_path / "a.parquet.gz").touch()
    with pytest.raises(InputError, match="must end in one of"):
        rows_of(tmp_path / "a.parquet.gz")


def test_columns_under_other_names(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"question": "Q", "best": "A", "id": 1}\n{"question": "R", "best": "B", "prompt": null}\n'
    )
    columns = ColumnNames({"prompt": "question", "completion": "best"}, "id")
    assert rows_of(path, columns) == [{"prompt": "Q", "completion": "A"}, {"prompt": "R", "completion": "B"}]
    # Two names that are exchanged; a name that the rows have already.
    assert rows_of(path, ColumnNames({"best": "question", "question": "best"}, "id,prompt"))[0] == {
        "best": "Q",
        "question": "A",
    }
    assert rows_of(path, ColumnNames({"best": "gold"}))[0]["best"] == "A"
    with pytest.raises(
        InputError, match="calls a column 'qestion' completion, and .* the nearest is 'question'"
    ):
        rows_of(path, ColumnNames({"completion": "qestion"}))
    path.write_text('{"question": "Q", "prompt": "P"}\n')
    assert "stands in the row beside 'question'" in error_of(path, ColumnNames({"prompt": "question"}))[1]
    assert rows_of(path, ColumnNames({"prompt": "question"}, "prompt")) == [{"prompt": "Q"}]


def test_cells_are_read_by_our_names(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,reply,is_good\nQ,A,true\n")
    columns = ColumnNames({"prompt": "question", "completion": "reply", "label": "is_good"})
    assert rows_of(path, columns) == [{"prompt": "Q", "completion": "A", "label": "true"}]


@pytest.mark.parametrize(
    "value", ["prompt", '["a"]', '{"a": 1}', '{"": "a"}', {"a": ""}, '{"a": "x", "b": "x"}', 7]
)
def test_what_is_no_mapping_of_names(value):
    with pytest.raises(InputError, match=r"data\.columns"):
        read_columns(value, "data.columns")
    assert read_columns("", "data.columns") == {} == read_columns({}, "data.columns")
    assert read_columns('{"prompt": "q"}', "data.columns") == {"prompt": "q"}


def test_names_of_columns_are_part_of_what_is_cached(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Q", "good": "long answer", "short": "A", "id": 1}\n')
    lengths = []
    for name in ("good", "short"):
        other = {"good": "short", "short": "good"}[name]
        options = TokenizeOptions(columns=ColumnNames({"completion": name}, other))
        (source,) = build(str(path), byte_tokenizer(), options, cache_dir=tmp_path).sources
        lengths.append(int(source.lengths[0]))
    assert lengths == [len("Qlong answer") + 1, len("QA") + 1]


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("text", ["value", "content", "text"])
@pytest.mark.parametrize(
    ("human", "gpt"), [("human", "gpt"), ("user", "assistant"), ("Human", "ChatGPT"), ("prompter", "bing")]
)
def test_sharegpts_other_names(column, text, human, gpt):
    row = {column: [{"from": human, text: "Q"}, {"from": gpt, text: "A"}]}
    expected = to_conversation(
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    )
    assert to_conversation(row) == expected
    by_role = {column: [{"role": turn["from"], text: turn[text]} for turn in row[column]]}
    if text != "text":
        assert to_conversation(by_role) == expected


def test_roles_of_tools_and_developers():
    turns = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    assert [message["role"] for message in to_conversation({"messages": turns}).messages] == [
        "developer",
        "user",
        "assistant",
    ]
    for role in ("function", "tool", "observation", "tool_response", "function_response", "ipython"):
        chat = [turns[1], turns[2], {"from": role, "value": "R"}, turns[2]]
        assert to_conversation({"conversations": chat}).messages[2] == {"role": "tool", "content": "R"}


def test_a_packed_csv_becomes_preferences_as_its_json_lines_do(tmp_path):
    rows = [
        {"question": f"Q{n}?", "good": f'yes, "{n}"\n', "bad": "no", "margin": n / 2, "is": n % 2 == 0}
        for n in range(6)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(csv_text(rows).encode()))
    options = TokenizeOptions(
        columns=ColumnNames({"prompt": "question", "chosen": "good", "rejected": "bad"}, "is")
    )
    stored = []
    for name in ("a.jsonl", "a.csv.gz"):
        data = build_preferences(str(tmp_path / name), byte_tokenizer(), options, cache_dir=tmp_path)
        (source,) = data.sources
        stored.append(
            (source.store.tokens.tolist(), source.arrays.margin.tolist(), data.text().partition(": ")[2])
        )
    assert stored[0] == stored[1]
    assert stored[0][1] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
