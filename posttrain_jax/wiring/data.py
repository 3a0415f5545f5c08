"""From `config.data` to rows: read, tokenized (or found in the cache), split, packed, and said in one line each."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict as Config
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.data.chat_template import ChatOptions, read_variables, shown_dates
from posttrain_jax.data.packing import PackedRows, efficiency, pack
from posttrain_jax.data.preference_groups import PreferenceData
from posttrain_jax.data.preference_rows import RowShape, row_shape
from posttrain_jax.data.rows import ColumnNames, RowError, one_line, read_columns
from posttrain_jax.data.shown_row import shown_row
from posttrain_jax.data.sources import MIXTURE, weighted_sources
from posttrain_jax.data.split import Data, hold_out, split_amount, trained_rows
from posttrain_jax.data.text_rows import parse
from posttrain_jax.data.tokenized import TokenizedData, TokenizeOptions, build
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.demo.assets import fetch


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows to train and to evaluate on."""

    train: list[PackedRows]
    held_out: list[PackedRows]


def tokenize_options(data: Mapping[str, Any]) -> TokenizeOptions:
    """How rows become sequences, as `config.data` says: an experiment's, an evaluation's, or that of a run's
    config.json, which may be older than a key; preferences have no `train_on`."""
    of_some = {"train_on": "all_turns", "text_as": "plain", "chat_template_kwargs": ""}
    rules = {**of_some, **data}
    return TokenizeOptions(
        max_length=rules["max_length"],
        truncate=rules["truncate"],
        train_on=rules["train_on"],
        chat=ChatOptions(
            template=rules["chat_template"],
            variables=read_variables(rules["chat_template_kwargs"], "data.chat_template_kwargs"),
            text_as=rules["text_as"],
        ),
        on_bad_row=rules["on_bad_row"],
        columns=column_names(data),
        progress=jax.process_index() == 0,
    )


def column_names(data: Mapping[str, Any]) -> ColumnNames:
    """`data.columns` and `data.ignore_columns`, of a config that may be older than either.

    Raises:
      InputError: `data.columns` is no mapping of names.
    """
    return ColumnNames(read_columns(data.get("columns", ""), "data.columns"), data.get("ignore_columns", ""))


def chat_from_config(config: Config, tokenizer: PreTrainedTokenizerBase, workdir: Path) -> ChatOptions:
    """How the rows of `config.data` become text; the template of `data.chat_template` is the tokenizer's by now.

    The date that a template shows is that of the run's first start, kept in the workdir: what was tokenized belongs to
    the run, on whatever day it is resumed.

    Raises:
      InputError: `data.text_as` or `data.chat_template_kwargs` is nothing that can be used.
    """
    own = tokenizer.chat_template or ""
    shows_date = any(shown_dates(one) for one in ([own] if isinstance(own, str) else own.values()))
    return ChatOptions(
        variables=read_variables(config.data.chat_template_kwargs, "data.chat_template_kwargs"),
        now=_first_start(workdir) if shows_date else None,
        text_as=config.data.text_as,
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


def rows_from_config(config: Config, tokenizer: PreTrainedTokenizerBase, workdir: Path) -> Rows:
    """Reads, tokenizes (or finds in the cache), splits and packs `config.data`, and says what it did.

    Raises:
      InputError: bad rows, a missing file, nothing left to train on.
    """
    options = dataclasses.replace(
        tokenize_options(config.data), chat=chat_from_config(config, tokenizer, workdir)
    )
    train = build(data_spec(config.data.train), tokenizer, options, rejected_path=workdir / "rejected.jsonl")
    _say_read(train)
    held_out: TokenizedData | None = None
    if config.data.eval:
        amount = split_amount(data_spec(config.data.eval))
        if amount is not None:
            train, held_out = hold_out(train, amount, seed=config.seed)
        else:
            rejected = workdir / "rejected-eval.jsonl"
            held_out = build(data_spec(config.data.eval), tokenizer, options, rejected_path=rejected)
            _say_read(held_out)
            say_trained_rows(train, held_out)
    first = train.sources[0]
    shown = first.sequence(0)
    log_on_host0(f"first row ({first.row_id(0)}), trained between [[ and ]]:")
    log_on_host0(shown_row(tokenizer, shown.tokens, shown.loss_mask))
    rows = pack(train, config.data.max_length, packed=config.data.pack)
    evaluation = [] if held_out is None else pack(held_out, config.data.max_length, packed=config.data.pack)
    count = sum(len(part) for part in rows)
    log_on_host0(
        f"{count} rows of {config.data.max_length} tokens to train on, {efficiency(rows):.1%} of the places "
        f"filled; {0 if held_out is None else len(held_out)} sequences held out."
    )
    return Rows(train=rows, held_out=evaluation)


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Preference data to train and to evaluate on, and the rows they are packed into.

    Attributes:
      train, held_out: `held_out` is None where data.eval is "".
      shape: of a step's rows.
      eval_shape: of an evaluation's rows (the same length).
    """

    train: PreferenceData
    held_out: PreferenceData | None
    shape: RowShape
    eval_shape: RowShape


def preferences_from_config(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    workdir: Path,
    *,
    attention: str,
    change: Callable[[PreferenceData], PreferenceData] = lambda data: data,
) -> Preferences:
    """Reads, tokenizes (or finds in the cache) and splits the preferences of `config.data`, and says what it did.

    Args:
      config: the experiment.
      tokenizer: with its chat template.
      workdir: bad rows that are skipped are listed here.
      attention: the implementation that the model will use.
      change: what is done to the data after the split.

    Raises:
      InputError: bad rows, a missing file, nothing left to train on, a group that does not fit.
    """
    options = dataclasses.replace(
        tokenize_options(config.data), chat=chat_from_config(config, tokenizer, workdir)
    )
    train = build_preferences(
        data_spec(config.data.train), tokenizer, options, rejected_path=workdir / "rejected.jsonl"
    )
    _say_read(train)
    held_out: PreferenceData | None = None
    if config.data.eval:
        amount = split_amount(data_spec(config.data.eval))
        if amount is not None:
            train, held_out = hold_out(train, amount, seed=config.seed)
        else:
            rejected = workdir / "rejected-eval.jsonl"
            held_out = build_preferences(
                data_spec(config.data.eval), tokenizer, options, rejected_path=rejected
            )
            _say_read(held_out)
            say_trained_rows(train, held_out)
    first = train.sources[0]
    log_on_host0(f"first row ({first.row_id(0)}), compared or scored between [[ and ]]:")
    for shown in first.group(0).sequences[:2]:
        log_on_host0(shown_row(tokenizer, shown.tokens, shown.loss_mask))
    train, held_out = change(train), None if held_out is None else change(held_out)
    parts = [train] if held_out is None else [train, held_out]
    share = share_prompt(config.data.share_prompt, attention)
    shape = row_shape(
        parts, groups=config.train.rows_per_step, length=config.data.row_length, share_prompt=share
    )
    eval_shape = row_shape(parts, groups=eval_rows(config)[0], length=shape.length, share_prompt=share)
    log_on_host0(
        f"{len(train):,} prompts to train on, {0 if held_out is None else len(held_out):,} held out; "
        f"{config.train.rows_per_step} a step, packed into rows of {shape.length:,} tokens"
        + (", completions after a shared prompt." if share else ", every completion with its prompt.")
    )
    return Preferences(train=train, held_out=held_out, shape=shape, eval_shape=eval_shape)


def _say_read(data: TokenizedData | PreferenceData) -> None:
    log_on_host0(data.text())
    if data.warning():
        log_on_host0(data.warning())


def say_trained_rows(train: Data, held_out: Data) -> None:
    """Says how many rows of a `data.eval` of its own are training rows too, where some are."""
    count = trained_rows(train, held_out)
    if count:
        log_on_host0(
            f"{count:,} of the {len(held_out):,} rows of data.eval are training rows too: what is measured on them was "
            "trained on; take them out of data.train or of data.eval."
        )


def eval_rows(config: Config) -> tuple[int, int]:
    """(rows, micro-batches) of an evaluation's batch: micro-batches as large as training's, which fit in memory, and as
    many as `eval.batch_rows` needs."""
    micro = config.train.micro_rows or config.train.rows_per_step
    count = -(-config.eval.batch_rows // micro)
    return count * micro, count


def share_prompt(wanted: str, attention: str) -> bool:
    """Whether completions share their prompt: "auto" = wherever the attention implementation can.

    Raises:
      InputError: another word.
    """
    if wanted not in ("auto", "yes", "no"):
        raise InputError(f"data.share_prompt is {wanted!r}; use auto, yes or no.")
    return wanted == "yes" or (wanted == "auto" and attention != "splash")


def data_spec(value: Any) -> Any:
    """A data spec as `data.tokenized.build` takes it: a string, or (source, weight) pairs; `asset:NAME` is fetched.

    A mixture is written as JSON, `[["a.jsonl", 3], ["asset:NAME", 1]]`.

    Raises:
      InputError: a mixture that is no such list; an asset that cannot be fetched.
    """
    if isinstance(value, str) and value.startswith("["):
        try:
            value = parse(value, "data")
        except RowError as error:
            raise InputError(
                f"{one_line(value, 200)} is no mixture of data: {error.reason}; {MIXTURE}."
            ) from None
    if not isinstance(value, str):
        return [(_local(source), weight) for source, weight in weighted_sources(value)]
    return _local(value)


def _local(source: str) -> str:
    return str(fetch(source.removeprefix("asset:"))) if source.startswith("asset:") else source
