"""Held-out loss: how likely a model finds answers that it was not trained on, with an interval around it.

Every sequence's summed loss and its number of trained tokens are kept, so that all means, and their bootstrap over
sequences (tokens of one sequence are not independent), come from the same few numbers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config

from posttrain_jax.algorithms.contract import TextAlgorithm
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import read
from posttrain_jax.core.sharding import shard_multiple
from posttrain_jax.core.types import PyTree
from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.data.loader import eval_batch_count, eval_batches
from posttrain_jax.data.options import TextDataOptions, as_source
from posttrain_jax.data.packing import PackedRows, pack
from posttrain_jax.data.split import hold_out, split_amount
from posttrain_jax.data.tokenized import TokenizedData, TokenizeOptions, build
from posttrain_jax.evaluate.own_data import HeldOutData, held_out_by, run_config
from posttrain_jax.evaluate.statistics import Estimate, bootstrap_means, interval, share
from posttrain_jax.evaluate.tasks import Progress, TaskResult, check_first, print_data
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.prompts import need_tokenizer
from posttrain_jax.sampling.sequence_sums import sequence_sums
from posttrain_jax.wiring.algorithms import algorithm_named
from posttrain_jax.wiring.data import data_spec, kept_date, tokenize_options

DEMO = ("asset:alpaca_en_demo", "split:99")
"""What is evaluated on where neither `config.data` nor the model says anything: configs/sft/smollm2_135m.py's split."""

RULES: dict[str, Any] = {
    "max_length": 1024,
    "truncate": "right",
    "on_bad_row": "stop",
    "train_on": "all_turns",
    "columns": {},
    "ignore_columns": "",
    "text_as": "plain",
    "chat_template_kwargs": {},
}
"""How rows become sequences where neither `config.data` nor a run says anything."""


@dataclasses.dataclass(frozen=True)
class SequenceLosses:
    """One entry per sequence that has a trained token, in the order of the rows.

    Attributes:
      names: "file:line" of each sequence.
      loss_S: float64, nats, summed over the sequence's trained tokens.
      trained_S: int64, how many those are.
      correct_S: int64, at how many of them the target is the likeliest token.
      length_S: int64, all tokens of the sequence.
    """

    names: list[str]
    loss_S: np.ndarray
    trained_S: np.ndarray
    correct_S: np.ndarray
    length_S: np.ndarray


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The result of `held_out_loss`.

    Attributes:
      metrics: by name,
        loss_per_token: nats, sum of all losses / trained tokens; perplexity_per_token: its exp;
        token_accuracy: share of the trained tokens that are the model's likeliest;
        loss_per_sequence: nats, mean over sequences of the summed loss;
        mean_loss_per_sequence: nats, mean over sequences of the sequence's mean loss per token (every sequence
        counts the same); perplexity_per_sequence: its exp.
      tokens, trained_tokens, sequences, rows: how much was looked at; `rows` of the packed kind.
      per_sequence: where the numbers come from.
    """

    metrics: dict[str, Estimate]
    tokens: int
    trained_tokens: int
    sequences: int
    rows: int
    per_sequence: SequenceLosses

    def counts(self) -> dict[str, int]:
        """The counts by name."""
        return {
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "sequences": self.sequences,
            "rows": self.rows,
        }


def held_out_loss(
    model: Model,
    params: PyTree,
    rows: Sequence[PackedRows],
    *,
    batch_rows: int = 8,
    mesh: Mesh | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeldOut:
    """Held-out loss of all rows.

    Args:
      model, params: parameters sharded on `mesh`, or whole.
      rows: from `data.packing.pack`. With several processes every one reads all of them.
      batch_rows: rows at once, over all devices; rounded up to a multiple of mesh.data x mesh.fsdp.
      mesh: where the parameters lie; None = one device.
      bootstrap: resamples for the intervals; 0 makes them as narrow as the value.
      seed: of the resamples.
      progress: called with (batches done, batches).

    Raises:
      InputError: nothing to evaluate, or a loss that is not finite (names the sequence).
    """
    if batch_rows < 1:
        raise InputError(f"eval.batch_rows is {batch_rows}; it must be at least 1.")
    batch_rows = shard_multiple(batch_rows, mesh)
    total = eval_batch_count(rows, rows_per_step=batch_rows)

    def show(done: int) -> None:
        if progress is not None:
            progress(done, total)

    table = sequence_sums(
        model,
        params,
        (batch.arrays for batch in eval_batches(rows, rows_per_step=batch_rows)),
        mesh=mesh,
        progress=show,
    )
    names = [part.source.row_id(i) for part in rows for row in range(len(part)) for i in part.sequences(row)]
    return _summarize(table, names, sum(len(part) for part in rows), bootstrap, seed)


def _summarize(table: np.ndarray, names: list[str], rows: int, bootstrap: int, seed: int) -> HeldOut:
    kept = table[:, 1] > 0
    if not kept.any():
        raise InputError("There is nothing to evaluate: no held-out sequence has a trained token.")
    losses = SequenceLosses(
        names=[name for name, keep in zip(names, kept, strict=True) if keep],
        loss_S=table[kept, 0],
        trained_S=table[kept, 1].astype(np.int64),
        correct_S=table[kept, 2].astype(np.int64),
        length_S=table[kept, 3].astype(np.int64),
    )
    bad = np.flatnonzero(~np.isfinite(losses.loss_S))
    if bad.size:
        raise InputError(
            f"The loss of {bad.size} of {len(losses.names)} sequences is not finite, the first of them "
            f"{losses.names[bad[0]]}; the model's weights or model.dtype cannot be right."
        )
    return HeldOut(
        metrics=estimates(losses, bootstrap=bootstrap, seed=seed),
        tokens=int(table[:, 3].sum()),
        trained_tokens=int(losses.trained_S.sum()),
        sequences=len(losses.names),
        rows=rows,
        per_sequence=losses,
    )


def estimates(losses: SequenceLosses, *, bootstrap: int, seed: int) -> dict[str, Estimate]:
    """The metrics of `HeldOut`, with intervals from `bootstrap` resamples of the sequences."""
    columns_S4 = np.stack(
        [losses.loss_S, losses.trained_S, losses.correct_S, losses.loss_S / losses.trained_S], axis=1
    ).astype(np.float64)
    loss, trained, correct, mean_loss = bootstrap_means(columns_S4, resamples=bootstrap, seed=seed).T
    with np.errstate(over="ignore"):
        resampled = {
            "loss_per_token": loss / trained,
            "perplexity_per_token": np.exp(loss / trained),
            "token_accuracy": correct / trained,
            "loss_per_sequence": loss,
            "mean_loss_per_sequence": mean_loss,
            "perplexity_per_sequence": np.exp(mean_loss),
        }
    intervals = {name: interval(values) for name, values in resampled.items()}
    return intervals | {"token_accuracy": share(correct / trained, losses.correct_S / losses.trained_S)}


def from_config(
    config: Config, loaded: LoadedModel, out: Path, *, mesh: Mesh, progress: Progress | None = None
) -> TaskResult:
    """The evaluation that `config` names; rows that cannot be used go to `out/rejected.jsonl`.

    Raises:
      InputError: anything wrong with config or data.
    """
    source = data_of(config, loaded)
    rows_to_read = held_out_rows(config, loaded, out)
    data = print_data(sum(len(part.source) for part in rows_to_read), source.text(), first=config.data.first)
    result = held_out_loss(
        loaded.model,
        loaded.params,
        rows_to_read,
        batch_rows=config.eval.batch_rows,
        mesh=mesh,
        bootstrap=config.eval.bootstrap,
        seed=config.seed,
        progress=progress,
    )
    losses = result.per_sequence
    columns = (losses.names, losses.loss_S, losses.trained_S, losses.correct_S, losses.length_S)
    rows = [
        {
            "id": name,
            "row": name,
            "loss": float(loss),
            "loss_per_token": float(loss / trained),
            "trained_tokens": int(trained),
            "correct_tokens": int(correct),
            "tokens": int(length),
            "metrics": {
                "loss_per_token": (float(loss), float(trained)),
                "token_accuracy": (float(correct), float(trained)),
                "loss_per_sequence": (float(loss), 1.0),
            },
        }
        for name, loss, trained, correct, length in zip(*columns, strict=True)
    ]
    return TaskResult(result.metrics, result.counts(), rows, data=data)


def data_of(config: Config, loaded: LoadedModel) -> HeldOutData:
    """What `config.data` names; where it names nothing, what the run in a workdir held out, and for any other model
    DEMO.

    Raises:
      InputError: a part of nothing, or a run that held nothing out of which a loss is a language model's.
    """
    given, run = config.data, run_config(loaded)
    own = {} if run is None else run["data"]
    if given.train or given.eval not in ("", own.get("eval")):
        if not given.eval:
            raise InputError("data.eval is empty; give a path, a data set, or split:NUMBER of data.train.")
        if split_amount(given.eval) is None:
            return HeldOutData(given.eval, "", config.seed)
        if not given.train:
            raise InputError(f"data.eval={given.eval} is a part of data.train, which is empty.")
        # Of a run's own rows another seed would hold out some that it was trained on.
        seed = run["seed"] if run is not None and given.train == own["train"] else config.seed
        return HeldOutData(given.train, given.eval, seed)
    if run is None:
        return HeldOutData(*DEMO, config.seed)
    if not isinstance(algorithm_named(run["algorithm"]), TextAlgorithm):
        raise InputError(
            f"The run in {loaded.source.name} ({run['algorithm']}) held out no rows of the kind that this evaluation "
            "reads, texts or conversations; give some in data.eval."
        )
    return held_out_by(run, loaded.source.name)


def rules_of(config: Config, loaded: LoadedModel) -> TokenizeOptions:
    """How rows become sequences: what `config.data` leaves open is as in the run of a workdir, else as in RULES."""
    run = run_config(loaded)
    rules = {**RULES, "max_length": min(RULES["max_length"], loaded.config.max_length)}
    rules |= {} if run is None else {name: run["data"][name] for name in RULES if name in run["data"]}
    given = {name: config.data[name] for name in RULES if config.data[name] not in ("", -1, {})}
    data = read(TextDataOptions, {**rules, **given}, "data")
    chat = ChatOptions(
        template=config.data.chat_template,  # "": the run's is its tokenizer's by now
        variables=data.chat_template_kwargs,
        now=None if run is None else kept_date(loaded.source.path),
        text_as=data.text_as,
    )
    return tokenize_options(data, chat)


def held_out_rows(config: Config, loaded: LoadedModel, out: Path) -> list[PackedRows]:
    """The rows that `config.data` names, packed.

    Raises:
      InputError: the model has no tokenizer, or anything wrong with the data.
    """
    tokenizer = need_tokenizer(loaded)
    source, options = data_of(config, loaded), rules_of(config, loaded)
    if options.max_length > loaded.config.max_length:
        raise InputError(
            f"data.max_length={options.max_length} is more than the model's context of {loaded.config.max_length}."
        )
    check_first(config.data.first)
    data = build(
        data_spec(as_source(source.data, "data.eval")),
        tokenizer,
        options,
        rejected_path=out / "rejected.jsonl",
    )
    print("\n".join(filter(None, (data.text(), data.warning()))), file=sys.stderr)
    amount = split_amount(source.part)
    if amount is not None:
        data = hold_out(data, amount, seed=source.seed)[1]
    return pack(_first(data, config.data.first), options.max_length, packed=config.data.pack)


def _first(data: TokenizedData, count: int) -> TokenizedData:
    """The first `count` sequences of all sources together; 0 = all."""
    kept, left = [], count
    for source in data.sources if count else ():
        if left:
            kept.append(source.select(np.arange(min(left, len(source)))))
            left -= len(kept[-1])
    return dataclasses.replace(data, sources=tuple(kept)) if count else data
