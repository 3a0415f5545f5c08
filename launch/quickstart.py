"""Teaches SmolLM2-135M-Instruct who it is, on real data on this machine, continues with DPO, and shows what changed.
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
from ml_collections import ConfigDict

from launch import entry, train
from launch.config import load_file
from posttrain_jax.core.errors import InputError
from posttrain_jax.demo.asset_rows import identity_en
from posttrain_jax.demo.assets import fetch
from posttrain_jax.models.io.export import export_hf

EXAMPLE = "python -m launch.quickstart --name=Ada"
CONFIG = "configs/sft/smollm2_135m.py"
DPO_CONFIG = "configs/dpo/smollm2_135m.py"
IDENTITY = "asset:identity_en"
LINE = "-" * 78

QUICKSTART_VARIANT = flags.DEFINE_string("variant", "quickstart", f"Variant of {CONFIG} and {DPO_CONFIG}.")
QUICKSTART_DIR = flags.DEFINE_string(
    "dir",
    "runs/quickstart",
    "Folder of the SFT run; DPO's is DIR-dpo. A finished quickstart there is replaced.",
)
NAME = flags.DEFINE_string("name", "Ember", "The name that the model learns.")
AUTHOR = flags.DEFINE_string("author", "you", "Who it learns to name as its developer.")


def main(argv: Sequence[str]) -> int:
    """Fetches, trains, exports, and prints what changed."""
    del argv
    started = time.time()
    variant = QUICKSTART_VARIANT.value
    workdir = Path(QUICKSTART_DIR.value)
    dpo_workdir = workdir.with_name(workdir.name + "-dpo")
    if _complete(dpo_workdir):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.rmtree(dpo_workdir)
    config, dpo_config = (load_file(f"{name}:{variant}") for name in (CONFIG, DPO_CONFIG))
    _write_identity(config, workdir / "identity.jsonl")
    entry.set_up_jax()
    folder = workdir / "hf"
    if not _complete(workdir):
        print(f"Stage 1 of 2: supervised fine-tuning with {CONFIG}:{variant}; a few minutes on two cores.")
        shutil.rmtree(folder, ignore_errors=True)
        train.run(config.lock(), workdir)
        _require_complete(workdir)
    if not folder.is_dir():
        _export(workdir, folder)
    print(f"Stage 2 of 2: DPO from {workdir} with {DPO_CONFIG}:{variant}.")
    dpo_config.model.init = str(workdir)
    dpo_config.model.tokenizer = ""
    train.run(dpo_config.lock(), dpo_workdir)
    _require_complete(dpo_workdir)
    report(workdir)
    report_preferences(dpo_workdir)
    print(
        f"\nCurves                 {workdir / 'curves.png'}, {dpo_workdir / 'curves.png'}"
        f"\nHugging Face export    {folder}   (AutoModelForCausalLM.from_pretrained loads it)"
        f"\nTotal time             {time.time() - started:.0f} s"
        f"\n\nTalk to it:            .venv/bin/python -m launch.chat --model={workdir}      (or {dpo_workdir})"
        "\nYour own data:         .venv/bin/python -m launch.train --config=configs/sft/smollm2_135m.py "
        "--config.data.train=YOUR.jsonl --workdir=runs/mine"
    )
    return 0


def _write_identity(config: ConfigDict, path: Path) -> None:
    """Where the data are a mixture, puts in the place of its identity rows a file of them with --name and --author."""
    if isinstance(config.data.train, str):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(identity_en([fetch("identity").read_bytes()], name=NAME.value, author=AUTHOR.value))
    config.data.train = tuple(
        (str(path) if source == IDENTITY else source, weight) for source, weight in config.data.train
    )


def _complete(workdir: Path) -> bool:
    summary = workdir / "summary.json"
    try:
        return json.loads(summary.read_text())["status"] == "complete"
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not what a run writes
        return False


def _require_complete(workdir: Path) -> None:
    if not _complete(workdir):
        raise InputError(f"The run was interrupted; run the same command again to continue ({workdir}).")


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
    """Prints what to look at, the completions before and after, held-out loss and speed."""
    rows = _lines(workdir / "metrics.jsonl")
    held_out = [row for row in rows if "eval/loss" in row]
    speeds = sorted(row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row)
    first, last = held_out[0], held_out[-1]
    samples = _lines(workdir / "samples.jsonl")
    before = {row["prompt"]: row for row in samples if row["step"] == 0}
    after = {row["prompt"]: row for row in samples if row["step"] == last["step"]}
    if (workdir / "identity.jsonl").is_file():
        print(
            f"\n{LINE}\nLook at the first two prompts: now the model is {NAME.value}; before, it made something up.\n"
            "Look at the other prompts: their completions should be as good as before."
        )
    for prompt in after:
        print(f"{LINE}\nPrompt: {prompt}")
        for name, row in (("before", before[prompt]), ("after", after[prompt])):
            text = row["completion"].strip() + ("" if row["finish_reason"] == "stop" else " ...")
            print(f"{name}:")
            for line in filter(str.strip, text.split("\n")):
                print(textwrap.fill(line, 74, initial_indent="  ", subsequent_indent="  "))
    print(LINE)
    print(f"{'SFT':34}{'before':>14}{'after ' + str(last['step']) + ' steps':>22}")
    print(f"{'held-out loss (nats per token)':34}{first['eval/loss']:14.4f}{last['eval/loss']:22.4f}")
    print(f"{'held-out perplexity':34}{first['eval/perplexity']:14.3f}{last['eval/perplexity']:22.3f}")
    print(f"{'training tokens per second':34}{'':14}{speeds[len(speeds) // 2]:22.0f}")
    print(LINE)


def report_preferences(workdir: Path) -> None:
    """Prints what DPO did to the held-out pairs."""
    rows = _lines(workdir / "metrics.jsonl")
    held_out = [row for row in rows if "eval/loss" in row]
    first, last = held_out[0], held_out[-1]
    print(f"{'DPO':34}{'before':>14}{'after ' + str(last['step']) + ' steps':>22}")
    print(f"{'held-out DPO loss (log 2 = even)':34}{first['eval/loss']:14.4f}{last['eval/loss']:22.4f}")
    print(f"{'held-out pairs ranked right':34}{'(all tied)':>14}{last['eval/reward_accuracy']:22.0%}\n{LINE}")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


if __name__ == "__main__":
    entry.run(main, example=EXAMPLE)
