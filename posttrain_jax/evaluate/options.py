"""The sections of an evaluation's config, by task."""

from __future__ import annotations

import dataclasses
from typing import Any

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import Sections, check, setting
from posttrain_jax.core.sharding import MeshOptions
from posttrain_jax.data.options import Source
from posttrain_jax.data.rows import read_columns

ON_BAD_ROW = ("stop", "skip")
RENDER = ("chat", "text", "auto")


@dataclasses.dataclass(frozen=True)
class SeedOptions:
    """The keys that lie in no section."""

    seed: int = setting(0, "of intervals, of what is drawn, and of a split")

    def __post_init__(self) -> None:
        check(self, "")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How the model is computed."""

    dtype: str = setting("float32", "compute dtype", choices=("float32", "bfloat16"))
    attention: str = setting(
        "auto",
        "implementation; cudnn needs a GPU, splash a TPU",
        choices=("auto", "xla", "blocks", "cudnn", "splash"),
    )
    ema: bool = setting(
        False, "of a workdir: the moving average of the weights, also where eval.weights was raw"
    )

    def __post_init__(self) -> None:
        check(self, "model")


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """What all tasks have."""

    task: str = setting("", "what is evaluated")
    batch_rows: int = setting(16, "rows at once on all devices", unit="rows", minimum=1)
    bootstrap: int = setting(1000, "resamples of an interval; 0 = no intervals")

    def __post_init__(self) -> None:
        check(self, "eval")


@dataclasses.dataclass(frozen=True)
class CompletionEvalOptions(EvalOptions):
    """Of a task that checks what the model writes."""

    max_new_tokens: int = setting(512, "of a completion", unit="tokens", minimum=1)
    temperature: float = setting(0.0, "0 = greedy")
    stop: tuple[str, ...] = setting(
        (), 'texts that end a completion, such as "\\nQuestion:" for a base model'
    )


@dataclasses.dataclass(frozen=True)
class KlEvalOptions(EvalOptions):
    """Of the KL to the reference."""

    max_new_tokens: int = setting(128, "the KL is that of completions cut off here", unit="tokens", minimum=1)
    num_samples: int = setting(1, "completions of each prompt, drawn at temperature 1", minimum=1)


@dataclasses.dataclass(frozen=True)
class HeldOutDataOptions:
    """Rows of held-out loss; "" and -1: as in the run of a workdir, else 1,024 tokens, right, stop, all_turns."""

    train: Source = setting("", 'what "split:" is taken from')
    eval: Source = setting(
        "", 'path, folder, hf:NAME, tfds:NAME, or "split:0.05" / "split:200" of data.train'
    )
    first: int = setting(0, "only so many sequences; 0 = all")
    pack: bool = setting(True, "several sequences in a row")
    max_length: int = setting(-1, "of a row", unit="tokens", minimum=-1)
    truncate: str = setting("", "what happens to a longer sequence", choices=("", "right", "drop", "error"))
    on_bad_row: str = setting("", "what a row that cannot be read does", choices=("", *ON_BAD_ROW))
    columns: dict[str, Any] = setting({}, 'our names of columns of the rows: {"prompt": "question"}')
    ignore_columns: str = setting("", 'columns of the rows that are not read, "a,b"')
    train_on: str = setting("", "which turns count", choices=("", "all_turns", "last_turn"))
    text_as: str = setting(
        "", "text prompts and completions: as they are, or turns of a chat", choices=("", "plain", "chat")
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {}, 'variables of the template: {"enable_thinking": false}'
    )
    chat_template: str = setting(
        "", '"" = the model\'s own; a path, the text, or the name of one of several', longest=1_000_000
    )

    def __post_init__(self) -> None:
        check(self, "data")
        read_columns(self.columns, "data.columns")
        if self.max_length in (0, 1):
            raise InputError(f"data.max_length is {self.max_length}; it must be at least 2.")


@dataclasses.dataclass(frozen=True)
class RowDataOptions:
    """Rows that a task asks the model about."""

    eval: Source = setting("", "asset:NAME, path, folder, hf:NAME, tfds:NAME")
    prompt: str = setting("{prompt}", "{column} of the row", longest=100_000)
    first: int = setting(0, "only so many rows; 0 = all")
    on_bad_row: str = setting("stop", "what a row that cannot be read does", choices=ON_BAD_ROW)
    render: str = setting("auto", "auto: chat where the tokenizer has a template", choices=RENDER)
    chat_template_kwargs: dict[str, Any] = setting(
        {}, 'variables of the template: {"enable_thinking": false}'
    )

    def __post_init__(self) -> None:
        check(self, "data")


@dataclasses.dataclass(frozen=True)
class MathDataOptions(RowDataOptions):
    """Of math."""

    answer: str = setting("answer", 'the column of the right result, "42" or "... #### 42"')


@dataclasses.dataclass(frozen=True)
class ChoiceDataOptions(RowDataOptions):
    """Of multiple choice."""

    choices: str = setting("options", "the column of the choices")
    answer: str = setting("answer", "the column of the right one: text, letter, or index")
    count_from: str = setting(
        "auto", "indices count from 0 or 1; auto: as all rows together say", choices=("auto", "0", "1")
    )


@dataclasses.dataclass(frozen=True)
class ReferenceOptions:
    """What the KL is measured to."""

    model: str = setting("", 'a MODEL with the same tokens; "" = what the run in a workdir started from')

    def __post_init__(self) -> None:
        check(self, "reference")


SHARED: Sections = {"": SeedOptions, "data": RowDataOptions, "eval": EvalOptions, "model": ModelOptions}
TASKS: dict[str, Sections] = {
    "held_out": {**SHARED, "data": HeldOutDataOptions, "mesh": MeshOptions},
    "ifeval": {**SHARED, "eval": CompletionEvalOptions, "mesh": MeshOptions},
    "math": {**SHARED, "data": MathDataOptions, "eval": CompletionEvalOptions, "mesh": MeshOptions},
    "multiple_choice": {**SHARED, "data": ChoiceDataOptions, "mesh": MeshOptions},
    "kl": {**SHARED, "eval": KlEvalOptions, "mesh": MeshOptions, "reference": ReferenceOptions},
}


def sections_of_task(task: object) -> Sections:
    """The sections of a task's config.

    Raises:
      InputError: there is no such task.
    """
    if not isinstance(task, str) or task not in TASKS:
        raise InputError(f"eval.task is {task!r}; it must be one of {', '.join(TASKS)}.")
    return TASKS[task]
