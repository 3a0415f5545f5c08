"""TRL's SFTTrainer on the prepared sequences, which it is given as token ids and labels.

Variants, joined by commas:
  ""             a step pads its sequences to the longest of them
  packed         TRL packs (best-fit decreasing) and flattens a step's rows into one (padding-free)
  checkpointing  gradient checkpointing, which is TRL's own default: less memory, more time
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl

from experiments.bench.adapters import lora_config
from experiments.bench.contract import Recorder, Settings, load_packed, load_sequences, parse_settings
from experiments.bench.trl_arguments import trl_arguments

VARIANTS = {"packed", "checkpointing"}


class CountingTrainer(trl.SFTTrainer):
    """Counts a step's tokens and reports when the step is done; the training itself is TRL's."""

    recorder: Recorder
    real = trained = 0
    last_loss = float("nan")

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in TRL, after counting."""
        labels = inputs["labels"]
        mask = inputs.get("attention_mask")
        self.real = int(mask.sum()) if mask is not None else count_unpadded(inputs["position_ids"][0])
        self.trained = int((labels[:, 1:] != -100).sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.last_loss = loss.item()
        return loss


def count_unpadded(positions: torch.Tensor) -> int:
    """Tokens in a padding-free batch, which has no mask: its padding is a run of position 0 at the end."""
    return int(positions.nonzero()[-1]) + 1


class StepTimes(transformers.TrainerCallback):
    """Tells the recorder where the loop starts and where each step ends."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.trainer: CountingTrainer | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The loop starts."""
        self.recorder.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has stepped."""
        assert self.trainer is not None
        self.recorder.step(loss=self.trainer.last_loss, real=self.trainer.real, trained=self.trainer.trained)


def make_trainer(settings: Settings, folder: str, recorder: Recorder) -> CountingTrainer:
    """float32 on the CPU, constant learning rate, no evaluation, no saving, no reporting."""
    chosen = set(filter(None, settings.variant.split(",")))
    if not chosen <= VARIANTS:
        raise SystemExit(f"error: unknown variant {settings.variant!r}; known: {', '.join(sorted(VARIANTS))}")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.rows / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.rows / "model")
    sequences = load_sequences(settings.rows)
    arguments = trl_arguments(folder, at_once=settings.rows_per_step, accumulated=1, lr=settings.lr) | {
        "max_steps": settings.steps,
        "gradient_checkpointing": "checkpointing" in chosen,
        "packing": "packed" in chosen,
        "max_length": load_packed(settings.rows).tokens.shape[1],
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
    }
    config = trl.SFTConfig(**arguments)
    times = StepTimes(recorder)
    trainer = CountingTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(sequences),
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora_rank) if settings.lora_rank else None,
        callbacks=[times],
    )
    times.trainer = trainer
    return trainer


def main() -> None:
    """Trains for a few steps and prints the line."""
    settings = parse_settings(__doc__)
    torch.set_num_threads(settings.threads)
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    recorder = Recorder("trl", settings, versions)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(settings, folder, recorder).train()
    sys.stdout.flush()
    recorder.finish()


if __name__ == "__main__":
    main()
