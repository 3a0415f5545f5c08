"""Files of completions as launch.generate writes them, for the tests of launch.win_rate."""

from __future__ import annotations

import json

from launch.win_rate import Options


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answers(folder, name, texts, **columns):
    """A file of answers to prompts that stand in its rows."""
    rows = [
        {"id": n, "sample": 0, "text": text, "prompt": f"p{n}", **columns} for n, text in enumerate(texts)
    ]
    return write(folder / name, rows)


def options(folder, judge, *, a, b, **change):
    return Options(a=str(a), b=str(b), judge=judge, out=str(folder / "out"), resamples=50, **change)


def two_files(folder):
    """6 pairs; B's answers are longer by 2 characters on 3 of them and shorter by 1 on the others."""
    a = answers(folder, "a.jsonl", ["aaaa"] * 6)
    b = answers(folder, "b.jsonl", ["bbbbbb", "bbb"] * 3)
    return a, b
