"""Arithmetic and word problems: is the result that a model writes equal to the reference?

A row is a problem's columns, put into a prompt by a template, and a reference answer: a number or formula, with or
without a unit, or a whole solution that ends with `#### 42` as in GSM8K (arXiv:2110.14168).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from ml_collections import ConfigDict as Config

from posttrain_jax.data.sources import Row, RowError
from posttrain_jax.evaluate.arithmetic import PREFIX, arithmetic_rows
from posttrain_jax.evaluate.completions import CompletionOptions, complete_all, completion_options
from posttrain_jax.evaluate.tasks import (
    Items,
    Progress,
    PromptTemplate,
    TaskResult,
    print_data,
    read_items,
    summarize,
    task_rows,
    text_column,
)
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.rewards.math_answers import MathVerifier, Verdict, final_part


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      key: its id.
      where: file and line.
      prompt: what the model is asked.
      reference: the right result.
      kind: which kind it is, or "".
    """

    key: str | int
    where: str
    prompt: str
    reference: str
    kind: str = ""


def load_problems(
    source: str,
    verifier: MathVerifier,
    *,
    prompt: str,
    answer: str,
    seed: int = 0,
    first: int = 0,
    on_bad_row: str = "stop",
) -> Items[Problem]:
    """The problems of a source.

    Args:
      source: "arithmetic:COUNT", "asset:NAME", or any source of `data.sources`. Optional columns: id, kind.
      verifier: refuses references that it cannot read.
      prompt: template of the prompt.
      answer: the column of the reference answer.
      seed: of arithmetic problems.
      first, on_bad_row: see `read_items`.

    Raises:
      InputError: there is no such source, the template is none, or a row cannot be used; names file and line.
    """
    template = PromptTemplate(prompt)

    def convert(row: Row, key: str | int) -> Problem:
        text = template.fill(row.value)
        reference = final_part(text_column(row.value, answer))
        if re.search(r"\d:\d|(?<!\\);", reference):
            raise RowError(
                answer, f"is {reference!r}, a time, ratio or list, of which one number would be compared"
            )
        if not verifier.can_read(reference):
            raise RowError(answer, f"is {reference!r}, in which math-verify finds no number or formula")
        return Problem(key, f"{row.source}:{row.line}", text, reference, str(row.value.get("kind") or ""))

    rows = arithmetic_rows(source, seed=seed) if source.startswith(PREFIX) else task_rows(source)
    return read_items(rows, convert, first=first, on_bad_row=on_bad_row)


def math_problems(
    loaded: LoadedModel,
    problems: Items[Problem],
    verifier: MathVerifier,
    options: CompletionOptions,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> TaskResult:
    """Answers the problems and compares the results.

    Returns:
      metric accuracy (share of right answers). Counts: no_result (nothing that could be a result), errors
      (comparisons that failed or ran out of time; not right), unfinished. `by_type` counts each kind.

    Raises:
      InputError: a bad option, or a prompt that the model cannot take.
    """
    completions = complete_all(
        loaded,
        [problem.prompt for problem in problems.items],
        [problem.where for problem in problems.items],
        options,
        progress=progress,
    )
    verdicts: list[Verdict] = []
    rows = []
    by_type: dict[str, Counter[str]] = {}
    for problem, completion in zip(problems.items, completions, strict=True):
        verdict = verifier.compare(problem.reference, final_part(completion.after_thought() or ""))
        verdicts.append(verdict)
        if problem.kind:
            by_type.setdefault(problem.kind, Counter(count=0, right=0)).update(count=1, right=verdict.right)
        rows.append(
            {
                "id": problem.key,
                "prompt": problem.prompt,
                "reference": problem.reference,
                "answer": completion.text,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                **dataclasses.asdict(verdict),
                "metrics": {"accuracy": (float(verdict.right), 1.0)},
            }
        )
    return summarize(
        rows,
        counts={
            "skipped_rows": problems.skipped,
            "no_result": sum(verdict.extracted is None and verdict.error is None for verdict in verdicts),
            "errors": sum(verdict.error is not None for verdict in verdicts),
            "unfinished": sum(completion.finish_reason == "length" for completion in completions),
        },
        by_type={kind: dict(by_type[kind]) for kind in sorted(by_type)},
        bootstrap=bootstrap,
        seed=seed,
        shares=True,
    )


def from_config(config: Config, loaded: LoadedModel, *, progress: Progress | None = None) -> TaskResult:
    """The evaluation that `config` names.

    Raises:
      InputError: anything wrong with config or data, or a package is missing.
    """
    with MathVerifier() as verifier:
        problems = load_problems(
            config.data.eval,
            verifier,
            prompt=config.data.prompt,
            answer=config.data.answer,
            seed=config.seed,
            first=config.data.first,
            on_bad_row=config.data.on_bad_row,
        )
        data = print_data(
            len(problems.items), config.data.eval, first=config.data.first, skipped=problems.skipped
        )
        result = math_problems(
            loaded,
            problems,
            verifier,
            completion_options(config),
            bootstrap=config.eval.bootstrap,
            seed=config.seed,
            progress=progress,
        )
        return dataclasses.replace(result, data=data)
