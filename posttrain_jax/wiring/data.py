"""From the section `data` to rows: read, tokenized (or found in the cache), split and packed."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.data.chat_template import ChatOptions, shown_dates
from posttrain_jax.data.options import DataOptions, PreferenceDataOptions, Source, TextDataOptions
from posttrain_jax.data.packing import PackedRows, efficiency, pack
from posttrain_jax.data.preference_groups import PreferenceData
from posttrain_jax.data.preference_rows import Preferences, row_shape
from posttrain_jax.data.rows import ColumnNames
from posttrain_jax.data.shown_row import shown_row
from posttrain_jax.data.split import Data, hold_out, split_amount, trained_rows
from posttrain_jax.data.tokenized import TokenizedData, TokenizeOptions, build
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.demo.assets import fetch
from posttrain_jax.run.options import OfflineEvalOptions, TrainOptions

Reported = TypeVar("Reported", TokenizedData, PreferenceData)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows to train and to evaluate on."""

    train: list[PackedRows]
    held_out: list[PackedRows]


def tokenize_options(data: TextDataOptions | PreferenceDataOptions, chat: ChatOptions) -> TokenizeOptions:
    """How rows become sequences."""
    return TokenizeOptions(
        max_length=data.max_length,
        truncate=data.truncate,
        train_on=data.train_on if isinstance(data, TextDataOptions) else "all_turns",
        chat=chat,
        on_bad_row=data.on_bad_row,
        columns=column_names(data),
        progress=jax.process_index() == 0,
    )


def column_names(data: DataOptions) -> ColumnNames:
    """`data.columns` and `data.ignore_columns`."""
    return ColumnNames(data.columns, data.ignore_columns)


def chat_options(data: DataOptions, tokenizer: PreTrainedTokenizerBase, workdir: Path) -> ChatOptions:
    """How the rows become text. `data.chat_template` was set as the tokenizer's template before.

    The date that a template shows is that of the run's first start, kept in the workdir: what was tokenized belongs to
    the run, on whatever day it is resumed.
    """
    own = tokenizer.chat_template or ""
    shows_date = any(shown_dates(one) for one in ([own] if isinstance(own, str) else own.values()))
    return ChatOptions(
        variables=data.chat_template_kwargs,
        now=_first_start(workdir) if shows_date else None,
        text_as=data.text_as,
    )


def kept_date(workdir: Path) -> datetime.datetime | None:
    """The date that the rows of a run show, where its chat template shows one. Raises InputError."""
    path = workdir / "template_date.txt"
    if not path.is_file():
        return None
    try:
        return datetime.datetime.fromisoformat(path.read_text("utf-8").strip())
    except ValueError as error:
        raise InputError(f"{path} holds no date ({error}); write one such as 2024-07-26T12:00:00.") from error


def _first_start(workdir: Path) -> datetime.datetime:
    """The date that is kept, which is now where there is none; the same in all processes."""
    kept = kept_date(workdir)
    now = kept or datetime.datetime.now().replace(microsecond=0)
    if jax.process_count() > 1:
        first = np.asarray([now.toordinal(), now.hour * 3600 + now.minute * 60 + now.second], np.int32)
        day, second = multihost_utils.broadcast_one_to_all(first).tolist()
        now = datetime.datetime.fromordinal(day) + datetime.timedelta(seconds=second)
    if jax.process_index() == 0 and kept is None:
        partial = workdir / "template_date.partial"
        partial.write_text(now.isoformat() + "\n", "utf-8")
        partial.replace(workdir / "template_date.txt")
    return now


def read_texts(
    data: TextDataOptions, tokenizer: PreTrainedTokenizerBase, workdir: Path, *, seed: int
) -> Rows:
    """Reads, tokenizes (or finds in the cache), splits and packs texts and conversations, and logs what it did.

    Raises:
      InputError: bad rows, a missing file, nothing left to train on.
    """
    options = tokenize_options(data, chat_options(data, tokenizer, workdir))

    def read(source: Source, rejected: Path) -> TokenizedData:
        return _logged(build(data_spec(source), tokenizer, options, rejected_path=rejected))

    train, held_out = train_and_held_out(data, read, workdir, seed=seed)
    first = train.sources[0]
    shown = first.sequence(0)
    log_on_host0(f"first row ({first.row_id(0)}), trained between [[ and ]]:")
    log_on_host0(shown_row(tokenizer, shown.tokens, shown.loss_mask))
    rows = pack(train, data.max_length, packed=data.pack)
    evaluation = [] if held_out is None else pack(held_out, data.max_length, packed=data.pack)
    count = sum(len(part) for part in rows)
    log_on_host0(
        f"{count} rows of {data.max_length} tokens to train on, {efficiency(rows):.1%} of the "
        f"positions filled; {0 if held_out is None else len(held_out)} sequences held out."
    )
    return Rows(train=rows, held_out=evaluation)


def read_preferences(
    data: PreferenceDataOptions,
    tokenizer: PreTrainedTokenizerBase,
    workdir: Path,
    *,
    seed: int,
    rows_per_step: int,
    eval_rows: int,
    attention: str,
    change: Callable[..., PreferenceData] | None = None,
) -> Preferences:
    """Reads, tokenizes (or finds in the cache) and splits preferences, and logs what it did.

    Args:
      data: the section.
      tokenizer: with its chat template.
      workdir: bad rows that are skipped are listed here.
      seed: of what is held out, and of `change`.
      rows_per_step, eval_rows: prompts of a step, and of an evaluation's batch.
      attention: the implementation that the model will use.
      change: (data, *, seed, max_length) -> the data that are used, after the split; None = as they are.

    Raises:
      InputError: bad rows, a missing file, nothing left to train on, a group that does not fit.
    """
    options = tokenize_options(data, chat_options(data, tokenizer, workdir))

    def read(source: Source, rejected: Path) -> PreferenceData:
        return _logged(build_preferences(data_spec(source), tokenizer, options, rejected_path=rejected))

    train, held_out = train_and_held_out(data, read, workdir, seed=seed)
    first = train.sources[0]
    log_on_host0(f"first row ({first.row_id(0)}), compared or scored between [[ and ]]:")
    for shown in first.group(0).sequences[:2]:
        log_on_host0(shown_row(tokenizer, shown.tokens, shown.loss_mask))
    if change is not None:
        change = functools.partial(change, seed=seed, max_length=data.max_length)
        train, held_out = change(train), None if held_out is None else change(held_out)
    parts = [train] if held_out is None else [train, held_out]
    share = share_prompt(data.share_prompt, attention)
    shape = row_shape(parts, groups=rows_per_step, length=data.row_length, share_prompt=share)
    eval_shape = row_shape(parts, groups=eval_rows, length=shape.length, share_prompt=share)
    log_on_host0(
        f"{len(train):,} prompts to train on, {0 if held_out is None else len(held_out):,} held out; "
        f"{rows_per_step} a step, packed into rows of {shape.length:,} tokens"
        + (", completions after a shared prompt." if share else ", every completion with its prompt.")
    )
    return Preferences(train=train, held_out=held_out, shape=shape, eval_shape=eval_shape)


def train_and_held_out(
    data: DataOptions, read: Callable[[Source, Path], Data], workdir: Path, *, seed: int
) -> tuple[Data, Data | None]:
    """What is trained on, and what is held out: a part of it (`split:`), or a source of its own; None = nothing.

    Args:
      data: the section.
      read: (source, file in `workdir` that lists bad rows that are skipped) -> the data; logs what it read.
      workdir: of the run.
      seed: of the split.
    """
    train = read(data.train, workdir / "rejected.jsonl")
    if not data.eval:
        return train, None
    amount = split_amount(data.eval)
    if amount is not None:
        return hold_out(train, amount, seed=seed)
    held_out = read(data.eval, workdir / "rejected-eval.jsonl")
    log_trained_rows(train, held_out)
    return train, held_out


def _logged(data: Reported) -> Reported:
    """The data, after its report was logged."""
    log_on_host0(data.text())
    if data.warning():
        log_on_host0(data.warning())
    return data


def log_trained_rows(train: Data, held_out: Data) -> None:
    """Logs how many rows of a `data.eval` of its own are training rows too, where some are."""
    count = trained_rows(train, held_out)
    if count:
        log_on_host0(
            f"{count:,} of the {len(held_out):,} rows of data.eval are training rows too: what is measured on them was "
            "trained on; take them out of data.train or of data.eval."
        )


def eval_rows(train: TrainOptions, evaluation: OfflineEvalOptions) -> tuple[int, int]:
    """(rows, micro-batches) of an evaluation's batch: micro-batches as large as training's, which fit in memory, and as
    many as `eval.batch_rows` needs."""
    micro = train.micro_rows or train.rows_per_step
    count = -(-evaluation.batch_rows // micro)
    return count * micro, count


def share_prompt(choice: str, attention: str) -> bool:
    """Whether completions share their prompt: "auto" = wherever the attention implementation can."""
    return choice == "yes" or (choice == "auto" and attention != "splash")


def data_spec(source: Source) -> Any:
    """A source as `data.tokenized.build` takes it: a string, or (source, weight) pairs; `asset:NAME` is fetched.

    Raises:
      InputError: an asset that cannot be fetched.
    """
    if isinstance(source, str):
        return _local(source)
    return [(_local(name), weight) for name, weight in source]


def _local(source: str) -> str:
    return str(fetch(source.removeprefix("asset:"))) if source.startswith("asset:") else source
