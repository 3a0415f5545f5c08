"""IFEval (arXiv:2311.07911): does a completion follow instructions that a program can check?

541 prompts with 834 instructions of 25 types. A completion follows an instruction strictly if the check passes on the
text as it is, and loosely if it passes on any of its eight variants: as it is, without its first line, without its
last, without both; and each of these without asterisks. A prompt is followed if all its
instructions are. The checks are those of the package if-verifiable (Google's, Apache-2.0).

Departures: the language detector is seeded for every check, so that a verdict depends on the text alone; a thought is
left out (`rewards/thoughts.py`); a check that raises is counted, and not followed.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ml_collections import ConfigDict as Config

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.sources import Row, RowError
from posttrain_jax.demo.assets import fetch
from posttrain_jax.evaluate.completions import CompletionOptions, complete_all, completion_options
from posttrain_jax.evaluate.tasks import (
    Items,
    Progress,
    PromptTemplate,
    TaskResult,
    column,
    print_data,
    read_items,
    summarize,
    task_rows,
)
from posttrain_jax.models.io.load import LoadedModel

LEVELS = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")
NEEDS_SENTENCE_MODEL = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


@dataclasses.dataclass(frozen=True)
class IfevalPrompt:
    """One prompt of IFEval.

    Attributes:
      key: its id.
      where: file and line.
      text: what the model is asked.
      instructions: the type of each instruction, such as "punctuation:no_comma".
      arguments: keyword arguments of each instruction's check.
    """

    key: str | int
    where: str
    text: str
    instructions: tuple[str, ...]
    arguments: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Check:
    """What became of one instruction; `error` is the message of a check that failed to run."""

    instruction: str
    strict: bool
    loose: bool
    error: str | None = None


class Checkers:
    """The checks of if-verifiable. Raises InputError where the package is missing."""

    def __init__(self) -> None:
        try:
            langdetect = importlib.import_module("langdetect")
            registry = importlib.import_module("if_verifiable.ifeval.instructions_registry")
        except ImportError as error:
            raise InputError(
                f"IFEval's checks need the package if-verifiable ({error}); install it with pip install -e '.[eval]'."
            ) from error
        # langdetect draws from a generator that it makes anew, with this seed, for every text.
        langdetect.DetectorFactory.seed = 0
        self._by_type: dict[str, Callable[[str], Any]] = registry.INSTRUCTION_DICT

    def __contains__(self, instruction: str) -> bool:
        return instruction in self._by_type

    def types(self) -> list[str]:
        """All types of instructions."""
        return sorted(self._by_type)

    def checker(self, instruction: str, arguments: dict[str, Any], prompt: str) -> Any:
        """One check, ready to be asked `check_following(answer)`. Raises what the package raises at bad arguments."""
        checker = self._by_type[instruction](instruction)
        checker.build_description(**arguments)
        known = checker.get_instruction_args()
        if known and "prompt" in known:
            checker.build_description(prompt=prompt)
        return checker

    def check(self, prompt: IfevalPrompt, text: str) -> list[Check]:
        """Checks every instruction of a prompt, strictly and loosely, on a text without its thought."""
        with _quiet_root_logger():
            return [self._check_one(prompt, place, text) for place in range(len(prompt.instructions))]

    def _check_one(self, prompt: IfevalPrompt, index: int, text: str) -> Check:
        instruction = prompt.instructions[index]
        try:
            checker = self.checker(instruction, prompt.arguments[index], prompt.text)
            followed = [
                bool(variant.strip() and checker.check_following(variant)) for variant in loose_variants(text)
            ]
        except Exception as error:  # whatever a check of a text written by a model stumbles over
            return Check(instruction, strict=False, loose=False, error=f"{type(error).__name__}: {error}")
        return Check(instruction, strict=followed[0], loose=any(followed))


def loose_variants(text: str) -> list[str]:
    """The eight texts of the loose criterion; the first is the text itself."""
    lines = text.split("\n")
    texts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*texts, *(variant.replace("*", "") for variant in texts)]


def provide_sentence_model() -> None:
    """Makes NLTK find its English sentence model: where NLTK looks anyway, else the pinned one from the cache.

    Raises:
      InputError: it is in neither place and cannot be downloaded.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        root = fetch("nltk_punkt_tab").parents[1]
        # NLTK reads nothing from folders that others may write to, and umask 002 makes such folders.
        for folder in (root, root / "tokenizers"):
            mode = stat.S_IMODE(folder.stat().st_mode)
            if mode & 0o022:
                folder.chmod(mode & ~0o022)
        nltk.data.path.insert(0, str(root))


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """The checks log whole texts as errors where no language can be detected; the verdict itself is enough."""
    root = logging.getLogger()

    def ours(record: logging.LogRecord) -> bool:
        return record.module != "instructions"

    root.addFilter(ours)
    try:
        yield
    finally:
        root.removeFilter(ours)


def load_prompts(
    source: str,
    checkers: Checkers,
    *,
    prompt: str = "{prompt}",
    first: int = 0,
    on_bad_row: str = "stop",
) -> Items[IfevalPrompt]:
    """Prompts in the format of the paper's data: key, prompt, instruction_id_list, kwargs; `prompt` is a template of
    what is asked.

    Raises:
      InputError: a row that is not of this format, an instruction of an unknown type, or arguments that it does not
        take; names file and line. Or: a check needs the sentence model, which can be neither found nor fetched.
    """
    template = PromptTemplate(prompt)
    items = read_items(
        task_rows(source),
        lambda row, key: _prompt(row, key, checkers, template),
        key="key",
        first=first,
        on_bad_row=on_bad_row,
    )
    if any(name in NEEDS_SENTENCE_MODEL for prompt in items.items for name in prompt.instructions):
        provide_sentence_model()
    return items


def _prompt(row: Row, key: str | int, checkers: Checkers, template: PromptTemplate) -> IfevalPrompt:
    text = template.fill(row.value)
    names, given = column(row.value, "instruction_id_list"), column(row.value, "kwargs")
    if not isinstance(names, list) or not names:
        raise RowError("instruction_id_list", "must be a list of instruction types")
    unknown = [name for name in names if not isinstance(name, str) or name not in checkers]
    if unknown:
        raise RowError(
            "instruction_id_list", f"holds {unknown[0]!r}; the known types are {', '.join(checkers.types())}"
        )
    if not isinstance(given, list) or len(given) != len(names):
        raise RowError("kwargs", "must be a list with one object for each instruction")
    if not all(isinstance(one, dict) for one in given):
        raise RowError("kwargs", "must hold objects")
    # Some copies of the data fill in every argument of every type with null.
    arguments = tuple({name: value for name, value in one.items() if value is not None} for one in given)
    for place, (name, one) in enumerate(zip(names, arguments, strict=True)):
        try:
            checkers.checker(name, one, text)
        except Exception as error:  # the package raises whatever it stumbles over
            raise RowError(f"kwargs[{place}]", f"does not suit {name}: {error}") from error
    return IfevalPrompt(key, f"{row.source}:{row.line}", text, tuple(names), arguments)


def from_config(config: Config, loaded: LoadedModel, *, progress: Progress | None = None) -> TaskResult:
    """The evaluation that `config` names.

    Raises:
      InputError: anything wrong with config or data, or a package is missing.
    """
    checkers = Checkers()
    prompts = load_prompts(
        config.data.eval,
        checkers,
        prompt=config.data.prompt,
        first=config.data.first,
        on_bad_row=config.data.on_bad_row,
    )
    data = print_data(len(prompts.items), config.data.eval, first=config.data.first, skipped=prompts.skipped)
    result = ifeval(
        loaded,
        prompts,
        checkers,
        completion_options(config),
        bootstrap=config.eval.bootstrap,
        seed=config.seed,
        progress=progress,
    )
    return dataclasses.replace(result, data=data)


def ifeval(
    loaded: LoadedModel,
    prompts: Items[IfevalPrompt],
    checkers: Checkers,
    options: CompletionOptions,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> TaskResult:
    """Completes the prompts and checks the completions.

    Returns:
      metrics prompt_strict, prompt_loose (share of prompts with every instruction followed), instruction_strict,
      instruction_loose (share of instructions); intervals resample prompts. `by_type` counts each instruction type.

    Raises:
      InputError: a prompt that the model cannot take.
    """
    completions = complete_all(
        loaded,
        [prompt.text for prompt in prompts.items],
        [prompt.where for prompt in prompts.items],
        options,
        progress=progress,
    )
    rows: list[dict[str, Any]] = []
    by_type: dict[str, Counter[str]] = {}
    for prompt, completion in zip(prompts.items, completions, strict=True):
        checks = checkers.check(prompt, completion.after_thought() or "")
        for check in checks:
            by_type.setdefault(check.instruction, Counter(count=0, strict=0, loose=0)).update(
                count=1, strict=check.strict, loose=check.loose
            )
        rows.append(
            {
                "id": prompt.key,
                "prompt": prompt.text,
                "answer": completion.text,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "checks": [dataclasses.asdict(check) for check in checks],
                "metrics": levels(checks),
            }
        )
    return summarize(
        rows,
        counts={
            "skipped_rows": prompts.skipped,
            "instructions": sum(len(prompt.instructions) for prompt in prompts.items),
            "errors": sum(check["error"] is not None for row in rows for check in row["checks"]),
            "unfinished": sum(completion.finish_reason == "length" for completion in completions),
        },
        by_type={name: dict(by_type[name]) for name in sorted(by_type)},
        bootstrap=bootstrap,
        seed=seed,
        shares=True,
    )


def levels(checks: list[Check]) -> dict[str, tuple[float, float]]:
    """(sum, count) of one prompt for each of LEVELS."""
    strict, loose = [check.strict for check in checks], [check.loose for check in checks]
    sums = (
        (float(all(strict)), 1.0),
        (float(sum(strict)), float(len(strict))),
        (float(all(loose)), 1.0),
        (float(sum(loose)), float(len(loose))),
    )
    return dict(zip(LEVELS, sums, strict=True))
