"""Evaluates a model on held-out rows: loss and perplexity, per token and per sequence, with intervals."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import config as config_flag
from launch import entry
from posttrain_jax.errors import InputError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from posttrain_jax.evaluate.held_out import HeldOut
    from posttrain_jax.load_model import LoadedModel

EXAMPLE = (
    "python -m launch.evaluate --model=runs/smollm2 --config=configs/eval/held_out.py --out=runs/smollm2-eval"
)


def define_flags() -> None:
    """The command line; not at import, so that modules with like-named flags can be imported together."""
    flags.DEFINE_string("model", None, "A Hugging Face folder or name, a .gguf file, or a workdir.")
    flags.DEFINE_string("out", None, "Folder for results.json and rows.jsonl; older ones there are replaced.")
    config_flag.define()


def main(argv: Sequence[str]) -> int:
    """Evaluates, writes the two files, and prints a table."""
    del argv
    given = flags.FLAGS
    if given.model is None or given.config is None or given.out is None:
        raise InputError(f"--model, --config and --out are needed; an example: {EXAMPLE}")
    entry.set_up_jax()
    evaluate(given.model, given.config, Path(given.out))
    return 0


def evaluate(name: str, config: ConfigDict, out: Path) -> dict[str, Any]:
    """Runs the evaluation that `config` names; what it returns is also in `out/results.json`.

    Raises:
      InputError: anything wrong with model, config or data.
    """
    import jax

    from posttrain_jax.evaluate.held_out import held_out_loss
    from posttrain_jax.load_model import load_model
    from posttrain_jax.sharding import make_mesh

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {out} cannot be made: {error.strerror}.") from error
    if config.eval.bootstrap < 0:
        raise InputError(f"eval.bootstrap is {config.eval.bootstrap}; it must be 0 (off) or more.")
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    loaded = load_model(
        name, dtype=config.model.dtype, mesh=mesh, attention=config.model.attention, ema=config.model.ema
    )
    rows = held_out_rows(config, loaded, out)
    result = held_out_loss(
        loaded.model,
        loaded.params,
        rows,
        batch_rows=config.eval.batch_rows,
        mesh=mesh,
        bootstrap=config.eval.bootstrap,
        seed=config.seed,
        progress=_show_progress,
    )
    record = {
        "model": name,
        "step": loaded.source.step,
        "metrics": {key: dataclasses.asdict(value) for key, value in result.metrics.items()},
        "counts": result.counts(),
        "config": config.to_dict(),
    }
    if jax.process_index() == 0:
        _write(out, record, result)
        print(table(result))
        print(f"Written to {out / 'results.json'} and {out / 'rows.jsonl'}.")
    return record


def held_out_rows(config: ConfigDict, loaded: LoadedModel, out: Path) -> list:
    """The rows that `config.data` names, packed.

    Raises:
      InputError: the model has no tokenizer, or anything wrong with the data.
    """
    from posttrain_jax.data.packing import pack
    from posttrain_jax.data.split import hold_out, split_amount
    from posttrain_jax.data.tokenized import TokenizeOptions, build

    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.source.name} has no tokenizer, so text cannot be evaluated; add its tokenizer files."
        )
    if not config.data.eval:
        raise InputError("data.eval is empty; give a path, a data set, or split:NUMBER of data.train.")
    if config.data.max_length > loaded.config.max_length:
        raise InputError(
            f"data.max_length={config.data.max_length} is more than the model's context of {loaded.config.max_length}."
        )
    options = TokenizeOptions(
        max_length=config.data.max_length,
        truncate=config.data.truncate,
        train_on=config.data.train_on,
        chat_template=config.data.chat_template,
        on_bad_row=config.data.on_bad_row,
    )
    amount = split_amount(config.data.eval)
    if amount is not None and not config.data.train:
        raise InputError(f"data.eval={config.data.eval} is a part of data.train, which is empty.")
    spec = config.data.eval if amount is None else config.data.train
    data = build(_path(spec), loaded.tokenizer, options, rejected_path=out / "rejected.jsonl")
    print(data.text(), file=sys.stderr)
    if amount is not None:
        data = hold_out(data, amount, seed=config.seed)[1]
    return pack(data, config.data.max_length, packed=config.data.pack)


def _path(spec: str) -> str:
    from posttrain_jax.assets import fetch

    return str(fetch(spec.removeprefix("asset:"))) if spec.startswith("asset:") else spec


def table(result: HeldOut) -> str:
    """The metrics with their intervals, and the counts."""
    lines = [f"{'':26}{'value':>12}{'95 % interval':>26}"]
    for name, estimate in result.metrics.items():
        lines.append(f"{name:26}{estimate.value:12.4f}{estimate.low:14.4f}{estimate.high:12.4f}")
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in result.counts().items())
    return "\n".join([*lines, counts])


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} batches", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _write(out: Path, record: dict[str, Any], result: HeldOut) -> None:
    """Both files, each renamed into place when whole; results.json last."""
    losses = result.per_sequence
    columns = (losses.names, losses.loss_S, losses.trained_S, losses.correct_S, losses.length_S)
    lines = [
        json.dumps(
            {
                "row": name,
                "loss": float(loss),
                "loss_per_token": float(loss / trained),
                "trained_tokens": int(trained),
                "correct_tokens": int(correct),
                "tokens": int(length),
            },
            ensure_ascii=False,
        )
        for name, loss, trained, correct, length in zip(*columns, strict=True)
    ]
    try:
        for name, text in (("rows.jsonl", "\n".join(lines)), ("results.json", json.dumps(record, indent=2))):
            partial = out / f"{name}.partial"
            partial.write_text(text + "\n", "utf-8")
            partial.replace(out / name)
    except OSError as error:
        raise InputError(f"The results cannot be written to {out}: {error.strerror}.") from error


if __name__ == "__main__":
    define_flags()
    entry.run(main, example=EXAMPLE)
