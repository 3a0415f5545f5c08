"""Instruction-tunes SmolLM2-135M on real data on this machine and shows what changed. `make quickstart` runs it."""

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
from posttrain_jax.assets import fetch
from posttrain_jax.errors import InputError
from posttrain_jax.export_model import export_hf

EXAMPLE = "python -m launch.quickstart"
CONFIG = "configs/sft/smollm2_135m.py"

QUICKSTART_VARIANT = flags.DEFINE_string("variant", "quickstart", f"Variant of {CONFIG}.")
QUICKSTART_DIR = flags.DEFINE_string(
    "dir", "runs/quickstart", "Folder of the run; a finished one is replaced."
)


def main(argv: Sequence[str]) -> int:
    """Fetches, trains, exports, and prints the table."""
    del argv
    started = time.time()
    workdir = Path(QUICKSTART_DIR.value)
    config = load_file(f"{CONFIG}:{QUICKSTART_VARIANT.value}")
    for value in (config.model.init, config.data.train):
        if value.startswith("asset:"):
            fetch(value.removeprefix("asset:"))
    if (workdir / "summary.json").is_file():
        shutil.rmtree(workdir)
    entry.set_up_jax()
    print(
        f"Training SmolLM2-135M-Instruct with {CONFIG}:{QUICKSTART_VARIANT.value}; a few minutes on two cores."
    )
    train.run(config.lock(), workdir)
    if json.loads((workdir / "summary.json").read_text())["status"] != "complete":
        raise InputError(f"The run was interrupted; run the same command again to go on ({workdir}).")
    folder = workdir / "hf"
    _export(workdir, folder)
    report(workdir)
    print(
        f"\nCurves                 {workdir / 'curves.png'}"
        f"\nHugging Face export    {folder}   (AutoModelForCausalLM.from_pretrained loads it)"
        f"\nWhole time             {time.time() - started:.0f} s"
        f"\n\nTalk to it:            .venv/bin/python -m launch.chat --model={workdir}"
        "\nYour own data:         .venv/bin/python -m launch.train --config=configs/sft/smollm2_135m.py "
        "--config.data.train=YOUR.jsonl --workdir=runs/mine"
    )
    return 0


def _export(workdir: Path, folder: Path) -> None:
    from posttrain_jax.load_model import load_model

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


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


if __name__ == "__main__":
    entry.run(main, example=EXAMPLE)
