"""Evaluates a model, with a 95 % confidence interval around every number and a JSON of every row.

`eval.task` of the config says what: held_out (loss and perplexity on held-out rows), ifeval (instructions that a
program can check), math (arithmetic and word problems), multiple_choice (by log-probability), kl (how far it has moved
from a reference model, on answers that it writes). What it is evaluated on is printed first. `launch.compare` tests the
difference between two models on the same rows.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from launch import config as config_flag
from launch import entry
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import all_values, read_all
from posttrain_jax.wiring.key_names import SYNONYMS

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from posttrain_jax.evaluate.tasks import TaskResult
    from posttrain_jax.models.io.load import LoadedModel

EXAMPLE = (
    "python -m launch.evaluate --model=runs/smollm2 --config=configs/eval/held_out.py --out=runs/smollm2-eval"
)


def define_flags() -> None:
    """The command line; not at import, so that modules with like-named flags can be imported together."""
    flags.DEFINE_string("model", None, "A Hugging Face folder or name, a .gguf file, or a workdir.")
    flags.DEFINE_string("out", None, "Folder for results.json and rows.jsonl; older ones there are replaced.")
    config_flag.define()
    flags.declare_key_flag("config")
    flags.DEFINE_bool("describe", False, "Prints every key of the config, and evaluates nothing.")


def main(argv: Sequence[str]) -> int:
    """Evaluates, writes the two files, and prints a table."""
    del argv
    given = flags.FLAGS
    if given.describe and given.config is not None:
        print(config_flag.describe(given.config))
        return 0
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

    from posttrain_jax.core.sharding import make_mesh
    from posttrain_jax.evaluate.options import sections_of_task
    from posttrain_jax.models.io.load import load_model

    sections = sections_of_task(config.eval.task if "eval" in config else None)
    values = all_values(read_all(sections, config.to_dict(), SYNONYMS))
    config = ConfigDict(
        {
            name: ConfigDict(values[name], convert_dict=False) if name in sections else values[name]
            for name in values
        },
        convert_dict=False,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {out} cannot be made: {error.strerror}.") from error
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    loaded = load_model(
        name,
        dtype=config.model.dtype,
        mesh=mesh,
        attention=config.model.attention,
        ema=config.model.ema or None,
    )
    result = run(config.eval.task, config, loaded, out, mesh)
    record = {
        "model": name,
        "step": loaded.source.step,
        "weights": loaded.source.weights,
        "task": config.eval.task,
        "data": result.data,
        "metrics": {key: dataclasses.asdict(value) for key, value in result.metrics.items()},
        "counts": result.counts,
        "by_type": result.by_type,
        "config": config.to_dict(),
    }
    if jax.process_index() == 0:
        write(out, record, result.rows)
        print(table(result))
        print(f"Written to {out / 'results.json'} and {out / 'rows.jsonl'}.")
    return record


def run(task: str, config: ConfigDict, loaded: LoadedModel, out: Path, mesh: Mesh) -> TaskResult:
    """Hands the evaluation to its task.

    Raises:
      InputError: anything wrong with config or data.
    """
    from posttrain_jax.evaluate import held_out, ifeval, kl_to_reference, math_problems, multiple_choice

    if task == "held_out":
        return held_out.from_config(config, loaded, out, mesh=mesh, progress=show_progress)
    if task == "multiple_choice":
        return multiple_choice.from_config(config, loaded, mesh=mesh, progress=show_progress)
    if task == "kl":
        return kl_to_reference.from_config(config, loaded, mesh=mesh, progress=show_progress)
    answered = {"ifeval": ifeval.from_config, "math": math_problems.from_config}[task]
    return answered(config, loaded, progress=show_progress)


def table(result: TaskResult) -> str:
    """The metrics with their intervals, the kinds of rows, and the counts."""
    lines = [f"{'':26}{'value':>12}{'95 % interval':>26}"]
    for name, estimate in result.metrics.items():
        lines.append(f"{name:26}{estimate.value:12.4f}{estimate.low:14.4f}{estimate.high:12.4f}")
    width = max((len(kind) for kind in result.by_type), default=0)
    for kind, of_kind in result.by_type.items():
        lines.append(f"  {kind:{width}}  " + ", ".join(f"{name} {count}" for name, count in of_kind.items()))
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in result.counts.items())
    return "\n".join([*lines, counts])


def show_progress(done: int, total: int) -> None:
    """On a terminal, how far it is."""
    if sys.stderr.isatty():
        print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def write(out: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Both files, each renamed into place when whole; results.json last."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    try:
        for name, text in (("rows.jsonl", "\n".join(lines)), ("results.json", json.dumps(record, indent=2))):
            partial = out / f"{name}.partial"
            partial.write_text(text + "\n", "utf-8", errors="replace")
            partial.replace(out / name)
    except OSError as error:
        raise InputError(f"The results cannot be written to {out}: {error.strerror}.") from error


if __name__ == "__main__":
    define_flags()
    entry.run(main, example=EXAMPLE)
