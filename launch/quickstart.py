"""Instruction-tunes SmolLM2-135M on real data on this machine, goes on with DPO on real pairs, and shows what changed.
`make quickstart` runs it."""

from __future__ import annotations

import json
import shutil
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import entry, train
from launch.config import load_file
from posttrain_jax.core.errors import InputError
from posttrain_jax.demo.assets import fetch
from posttrain_jax.models.io.export import export_hf

EXAMPLE = "python -m launch.quickstart"
CONFIG = "configs/sft/smollm2_135m.py"
DPO_CONFIG = "configs/dpo/smollm2_135m.py"

QUICKSTART_VARIANT = flags.DEFINE_string("variant", "quickstart", f"Variant of {CONFIG} and {DPO_CONFIG}.")
QUICKSTART_DIR = flags.DEFINE_string(
    "dir", "runs/quickstart", "Folder of the run, and with -dpo of the second; finished ones are replaced."
)


def main(argv: Sequence[str]) -> int:
    """Fetches, trains, exports, and prints the table."""
    del argv
    started = time.time()
    variant = QUICKSTART_VARIANT.value
    workdir = Path(QUICKSTART_DIR.value)
    dpo_workdir = workdir.with_name(workdir.name + "-dpo")
    config, dpo_config = (load_file(f"{name}:{variant}") for name in (CONFIG, DPO_CONFIG))
    for value in (config.model.init, config.data.train, dpo_config.data.train):
        if value.startswith("asset:"):
            fetch(value.removeprefix("asset:"))
    if _complete(dpo_workdir):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.rmtree(dpo_workdir)
    entry.set_up_jax()
    folder = workdir / "hf"
    if not _complete(workdir):
        print(f"Training SmolLM2-135M-Instruct with {CONFIG}:{variant}; a few minutes on two cores.")
        shutil.rmtree(folder, ignore_errors=True)
        train.run(config.lock(), workdir)
        _require_complete(workdir)
    if not folder.is_dir():
        _export(workdir, folder)
    print(f"Going on from {workdir} with preferences, {DPO_CONFIG}:{variant}.")
    dpo_config.model.init = str(workdir)
    dpo_config.model.tokenizer = ""
    train.run(dpo_config.lock(), dpo_workdir)
    _require_complete(dpo_workdir)
    report(workdir)
    report_preferences(dpo_workdir)
    print(
        f"\nCurves                 {workdir / 'curves.png'}, {dpo_workdir / 'curves.png'}"
        f"\nHugging Face export    {folder}   (AutoModelForCausalLM.from_pretrained loads it)"
        f"\nWhole time             {time.time() - started:.0f} s"
        f"\n\nTalk to it:            .venv/bin/python -m launch.chat --model={workdir}      (or {dpo_workdir})"
        "\nYour own data:         .venv/bin/python -m launch.train --config=configs/sft/smollm2_135m.py "
        "--config.data.train=YOUR.jsonl --workdir=runs/mine"
    )
    return 0


def _complete(workdir: Path) -> bool:
    summary = workdir / "summary.json"
    try:
        return json.loads(summary.read_text())["status"] == "complete"
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not what a run writes
        return False


def _require_complete(workdir: Path) -> None:
    if not _complete(workdir):
        raise InputError(f"The run was interrupted; run the same command again to go on ({workdir}).")


def _export(workdir: Path, folder: Path) -> None:
    from posttrain_jax.models.io.load import load_model

    loaded = load_model(str(workdir))
    export_hf(
        folder,
        config=loaded.config,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        lora=loaded.lora if loaded.lora.rank else None,
        original=loaded.original,
        generation=loaded.generation,
        overwrite=True,
    )


def report(workdir: Path) -> None:
    """Prints held-out loss, speed, and the answers before and after."""
    rows = _lines(workdir / "metrics.jsonl")
    held_out = [row for row in rows if "eval/loss" in row]
    speeds = sorted(row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row)
    first, last = held_out[0], held_out[-1]
    print("\n" + "-" * 78)
    print(f"{'':34}{'before':>14}{'after ' + str(last['step']) + ' steps':>22}")
    print(f"{'held-out loss (nats per token)':34}{first['eval/loss']:14.4f}{last['eval/loss']:22.4f}")
    print(f"{'held-out perplexity':34}{first['eval/perplexity']:14.3f}{last['eval/perplexity']:22.3f}")
    print(f"{'training tokens per second':34}{'':14}{speeds[len(speeds) // 2]:22.0f}")
    samples = _lines(workdir / "samples.jsonl")
    before = {row["prompt"]: row for row in samples if row["step"] == 0}
    after = {row["prompt"]: row for row in samples if row["step"] == last["step"]}
    for prompt in after:
        print("-" * 78)
        print(f"Prompt: {prompt}")
        for name, row in (("before", before[prompt]), ("after", after[prompt])):
            end = "" if row["finish_reason"] == "stop" else " ..."
            text = textwrap.fill(row["answer"].strip() + end, 68, initial_indent="  ", subsequent_indent="  ")
            print(f"{name}:\n{text}")
    print("-" * 78)


def report_preferences(workdir: Path) -> None:
    """Prints what DPO did to the held-out pairs."""
    rows = _lines(workdir / "metrics.jsonl")
    held_out = [row for row in rows if "eval/loss" in row]
    first, last = held_out[0], held_out[-1]
    print(f"{'DPO on pairs':34}{'before':>14}{'after ' + str(last['step']) + ' steps':>22}")
    print(f"{'held-out DPO loss (log 2 = even)':34}{first['eval/loss']:14.4f}{last['eval/loss']:22.4f}")
    print(
        f"{'held-out pairs ranked right':34}{'(all tied)':>14}{last['eval/reward_accuracy']:22.0%}\n"
        + "-" * 78
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


if __name__ == "__main__":
    entry.run(main, example=EXAMPLE)
