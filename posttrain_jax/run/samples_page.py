"""The samples of a run as a page to read in a browser: how the completions of a prompt change over the steps."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #1c1c1c }
section { margin: 2.5em 0 } h2 { font-size: 1em; white-space: pre-wrap; background: #f1f3f5; padding: .6em .8em }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top; padding: .35em .8em }
tr { border-top: 1px solid #d8dcdf } td.number { text-align: right; font-variant-numeric: tabular-nums }
td.completion { white-space: pre-wrap; overflow-wrap: anywhere } .cut { color: #a33 }
"""


def write_page(samples: Path, page: Path) -> None:
    """Writes `page` from a run's `samples.jsonl`: a section for each prompt, a line for each completion, in order.
    What is no sample is left out.

    Args:
      samples: rows with `step`, `prompt`, `completion` (in runs of an earlier version `answer`), `finish_reason`,
        `tokens`, and `score` where there is one.
      page: replaced at once, or not at all.
    """
    rows = [row for line in samples.read_bytes().split(b"\n") if line and _is_sample(row := json.loads(line))]
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        prompts.setdefault(_shown(row["prompt"]), []).append(row)
    sections = "\n".join(_section(prompt, completions) for prompt, completions in prompts.items())
    text = (
        f"<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<title>Samples</title>\n<style>{STYLE}</style>\n"
        f"<h1>Samples of {len(prompts)} prompts</h1>\n{sections}\n</html>\n"
    )
    partial = page.with_suffix(".partial")
    partial.write_text(text, "utf-8", errors="replace")  # half a character, as a cut completion may end with
    partial.replace(page)


def completion_of(row: dict[str, Any]) -> Any:
    """The completion of a row of `samples.jsonl`, also of an earlier version's."""
    return row.get("completion", row.get("answer"))


def _is_sample(row: dict[str, Any]) -> bool:
    """Whether a run wrote this; by hand anything may have been."""
    prompt = row.get("prompt")
    return (
        isinstance(completion_of(row), str)
        and isinstance(row.get("score", 0.0), int | float)
        and (
            isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt))
        )
    )


def _shown(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _section(prompt: str, completions: list[dict[str, Any]]) -> str:
    lines = "\n".join(_line(row) for row in completions)
    head = "<tr><th>step<th>score<th>tokens<th>completion</tr>"
    return f"<section>\n<h2>{html.escape(prompt)}</h2>\n<table>\n{head}\n{lines}\n</table>\n</section>"


def _line(row: dict[str, Any]) -> str:
    score = f"{row['score']:.3f}" if "score" in row else ""
    cut = "" if row.get("finish_reason") == "stop" else " <span class=cut title='no end token'>(cut)</span>"
    numbers = "".join(
        f"<td class=number>{html.escape(str(value))}" for value in (row["step"], score, row.get("tokens", ""))
    )
    return f"<tr>{numbers}<td class=completion>{html.escape(completion_of(row))}{cut}</tr>"
