"""The page of a run's samples."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from posttrain_jax.run.samples_page import write_page


class Cells(HTMLParser):
    """Texts of a page's headings and cells, as a browser reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.tag = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in ("h2", "td"):
            self.tag = tag
            self.found.append((tag, ""))
        elif tag in ("tr", "table"):
            self.tag = ""

    def handle_data(self, data: str) -> None:
        if self.tag:
            tag, text = self.found[-1]
            self.found[-1] = tag, text + data


def test_line_separators_in_a_text_do_not_cut_its_row(tmp_path: Path):
    """U+2028, U+2029 and U+0085 stand in JSON as they are."""
    row = {"step": 0, "prompt": "a\u2028b\x85c", "completion": "d\u2029e", "finish_reason": "stop"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    write_page(tmp_path / "samples.jsonl", tmp_path / "samples.html")
    assert "a\u2028b\x85c" in (tmp_path / "samples.html").read_text("utf-8")


def test_a_section_for_each_prompt_and_a_line_for_each_answer(tmp_path: Path):
    rows = [
        {
            "step": 0,
            "prompt": "1 < 2?",
            "completion": "<b>yes</b>",
            "score": 0.5,
            "finish_reason": "stop",
            "tokens": 3,
        },
        {"step": 0, "prompt": [{"role": "user", "content": "Hi"}], "answer": "A", "finish_reason": "length"},
        {
            "step": 9,
            "prompt": "1 < 2?",
            "completion": "no",
            "score": -1.25,
            "finish_reason": "stop",
            "tokens": 2,
        },
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_page(tmp_path / "samples.jsonl", tmp_path / "samples.html")
    cells = Cells()
    cells.feed((tmp_path / "samples.html").read_text("utf-8"))
    found = [(tag, text.strip()) for tag, text in cells.found]
    first = [("h2", "1 < 2?"), *(("td", text) for text in ("0", "0.500", "3", "<b>yes</b>"))]
    first += [("td", text) for text in ("9", "-1.250", "2", "no")]
    second = [("h2", "user: Hi"), ("td", "0"), ("td", ""), ("td", ""), ("td", "A (cut)")]
    assert found == first + second


def test_nothing_of_a_row_is_markup(tmp_path: Path):
    mark = "<script>alert('x')</script>"
    chat = [{"role": mark, "content": mark}, {"role": "user", "content": [{"text": mark}]}]
    row = {"step": mark, "prompt": chat, "completion": mark + "\ud83d", "finish_reason": mark, "tokens": mark}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    write_page(tmp_path / "samples.jsonl", tmp_path / "samples.html")
    page = (tmp_path / "samples.html").read_text("utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;") == 6


def test_what_is_no_sample_is_left_out(tmp_path: Path):
    odd = [
        {},
        {"prompt": 5, "completion": "x"},
        {"prompt": "p", "completion": []},
        {"prompt": ["p"], "answer": "x"},
    ]
    odd.append({"prompt": "p", "completion": "x", "score": "high"})
    rows = [{"step": 1, **row} for row in [*odd, {"prompt": "p", "answer": "kept"}]]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_page(tmp_path / "samples.jsonl", tmp_path / "samples.html")
    page = (tmp_path / "samples.html").read_text("utf-8")
    assert page.count("<td class=completion>") == 1 and "kept" in page
