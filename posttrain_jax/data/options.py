"""The section `data` of a config: which rows are read, and how they become tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from posttrain_jax.core.schema import Leaf, Rule, check, convert, setting
from posttrain_jax.data.chat import TRAIN_ON
from posttrain_jax.data.chat_template import TEXT_AS
from posttrain_jax.data.rows import read_columns
from posttrain_jax.data.sources import weighted_sources
from posttrain_jax.data.split import split_amount
from posttrain_jax.data.tokenized import ON_BAD_ROW, TRUNCATE

Source = str | tuple[tuple[str, float], ...]
"""A path, folder, hf:NAME, tfds:NAME or asset:NAME; or a mixture, ((SOURCE, weight), ...)."""


def as_source(value: Any, key: str) -> Source:
    """A source that a flag or a config of another kind holds, a mixture also as JSON text.

    Raises:
      InputError: it is none; names the key.
    """
    return convert(Leaf(key, Source, "", Rule("")), value)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What all algorithms have."""

    train: Source = setting(
        "", 'path, folder, hf:NAME, tfds:NAME, asset:NAME, or a mixture [["SOURCE", weight], ...]'
    )
    eval: Source = setting(
        "", 'the same, or "split:0.05" (a share) or "split:200" of the training rows; "" = none'
    )
    max_length: int = setting(1024, "longest sequence", unit="tokens", minimum=2)
    on_bad_row: str = setting("stop", "what a row that cannot be read does", choices=ON_BAD_ROW)
    columns: dict[str, str] = setting(
        {}, 'our name of a column -> the file\'s: {"prompt": "question", "completion": "best"}'
    )
    ignore_columns: str = setting("", 'columns of the rows that are not read, "a,b"')
    chat_template: str = setting(
        "", '"" = the model\'s own; a path, the text, or the name of one of several', longest=1_000_000
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {}, 'variables of the chat template: {"enable_thinking": false}'
    )
    text_as: str = setting(
        "plain", "text prompts and completions: as they are, or turns of a chat", choices=TEXT_AS
    )

    def __post_init__(self) -> None:
        check(self, "data")
        read_columns(self.columns, "data.columns")
        for source in (self.train, self.eval):
            if not isinstance(source, str):
                weighted_sources(list(source))
        split_amount(self.eval)


@dataclasses.dataclass(frozen=True)
class TextDataOptions(DataOptions):
    """Rows of supervised fine-tuning: texts and conversations."""

    truncate: str = setting("right", "what happens to a longer sequence", choices=TRUNCATE)
    pack: bool = setting(True, "several sequences in a row")
    train_on: str = setting("all_turns", "which turns of the assistant are trained", choices=TRAIN_ON)


@dataclasses.dataclass(frozen=True)
class PreferenceDataOptions(DataOptions):
    """Prompts with completions that were compared, labeled or rated; completions are packed, and trained on whole."""

    truncate: str = setting("right", "what happens to a longer sequence", choices=TRUNCATE)
    row_length: int = setting(
        0, "length of a packed row; 0 = what the longest prompt with its completions needs", unit="tokens"
    )
    share_prompt: str = setting(
        "auto",
        "the prompt once for all its completions; auto: where the attention can",
        choices=("auto", "yes", "no"),
    )


@dataclasses.dataclass(frozen=True)
class PromptDataOptions(DataOptions):
    """Prompts that the policy answers; `max_length` holds a prompt with its completion."""

    long_prompts: str = setting("error", "what a prompt that is too long does", choices=("error", "drop"))
    prompt_tokens: int = setting(0, "a `text` row's first so many tokens are its prompt", unit="tokens")
