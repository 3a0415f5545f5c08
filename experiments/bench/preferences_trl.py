"""TRL's DPOTrainer and RewardTrainer on the prepared pairs, which they are given as token ids.

Variants: pairs on the device at once, of which a step accumulates as many as it takes; "" is all of a step. (Its
padding-free batches are out of order in TRL 1.16: `padding_free=True` warns and pads.) Gradient checkpointing, TRL's
default, is off: it is slower.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl

from experiments.bench.preferences_contract import (
    BETA,
    Pair,
    Recorder,
    Settings,
    load_head,
    load_pairs,
    pairs_of_steps,
    parse_settings,
)
from experiments.bench.trl_arguments import trl_arguments


class Totals:
    """What a step's micro-batches add up to; `training_step` of both trainers fills it."""

    loss = 0.0
    places = 0

    def add(self, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        """One micro-batch; the loss is divided by their number already."""
        self.places += inputs["input_ids"].numel()
        self.loss += loss.item()


class CountingDPOTrainer(trl.DPOTrainer):
    """Takes pairs that are token ids already and counts; the training itself is TRL's."""

    totals: Totals

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any, **kwargs: Any) -> datasets.Dataset:
        """Nothing is left to do: the columns are those that TRL's own preparation makes."""
        return dataset

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in TRL, and counts."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.totals.add(inputs, loss)
        return loss


class CountingRewardTrainer(trl.RewardTrainer):
    """Counts; the training itself is TRL's."""

    totals: Totals

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in TRL, and counts."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.totals.add(inputs, loss)
        return loss


class StepTimes(transformers.TrainerCallback):
    """Tells the recorder where the loop starts and where each step ends."""

    def __init__(self, recorder: Recorder, trainer: Any, margin: str) -> None:
        self.recorder, self.trainer, self.margin = recorder, trainer, margin

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The loop starts."""
        self.trainer.totals = Totals()
        self.recorder.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has stepped."""
        count = self.trainer.args.gradient_accumulation_steps
        margins = self.trainer._metrics["train"][self.margin][-count:]
        totals = self.trainer.totals
        self.recorder.step(loss=totals.loss, margin=sum(margins) / len(margins), places=totals.places)
        self.trainer.totals = Totals()


def columns(pair: Pair, setting: str) -> dict[str, list[int]]:
    """A pair as TRL's trainers take it: with the prompt apart (DPO), or two whole sequences.

    DPOTrainer trains every token of a completion, so what follows the end of the turn is left out.
    """
    if setting == "reward_model":
        return {"chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
    return {
        "prompt_ids": pair.chosen[: pair.prompt],
        "chosen_ids": pair.chosen[pair.prompt : pair.chosen_trained],
        "rejected_ids": pair.rejected[pair.prompt : pair.rejected_trained],
    }


def load_dataset(settings: Settings) -> datasets.Dataset:
    """The pairs as a dataset on disk, where TRL also keeps the reference's log-probabilities."""
    folder: pathlib.Path = settings.rows / f"trl_{settings.setting}"
    if not (folder / "state.json").is_file():
        pairs = load_pairs(settings.rows)
        datasets.Dataset.from_list([columns(pair, settings.setting) for pair in pairs]).save_to_disk(folder)
    return datasets.load_from_disk(folder)


def make_trainer(settings: Settings, folder: str) -> Any:
    """float32 on the CPU, constant learning rate, no evaluation, no saving, no reporting."""
    together = int(settings.variant or settings.pairs_per_step)
    if settings.pairs_per_step % together:
        raise SystemExit(f"error: {settings.pairs_per_step} pairs do not divide into {together} at a time")
    arguments = trl_arguments(
        folder, at_once=together, accumulated=settings.pairs_per_step // together, lr=settings.lr
    ) | {
        "max_steps": settings.steps,
        "disable_dropout": True,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.rows / "model")
    if settings.setting == "reward_model":
        # transformers reads a score at the last token that is not padding; SmolLM2 pads with its end of turn.
        tokenizer.pad_token = "<|endoftext|>"
    dataset = load_dataset(settings)
    if settings.setting == "dpo":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            settings.rows / "model", dtype=torch.float32, attn_implementation="sdpa"
        )
        config = trl.DPOConfig(
            **arguments,
            beta=BETA,
            loss_type=["sigmoid"],
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=2,
        )
        return CountingDPOTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        settings.rows / "model", dtype=torch.float32, attn_implementation="sdpa", num_labels=1
    )
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(load_head(settings.rows).T))
    return CountingRewardTrainer(
        model=model,
        args=trl.RewardConfig(**arguments),
        train_dataset=dataset,
        processing_class=tokenizer,
    )


def main() -> None:
    """Trains for a few steps and prints the line."""
    settings = parse_settings(__doc__)
    torch.set_num_threads(settings.threads)
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    recorder = Recorder("trl", settings, versions)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, folder)
        if settings.prepare:
            return
        # After TRL has put the reference's log-probabilities beside all pairs: those that this run trains on.
        steps = pairs_of_steps(settings, len(trainer.train_dataset))
        trainer.train_dataset = trainer.train_dataset.select([i for step in steps for i in step])
        margin = {"dpo": "rewards/margins", "reward_model": "margin"}[settings.setting]
        trainer.add_callback(StepTimes(recorder, trainer, margin))
        trainer.train()
    sys.stdout.flush()
    recorder.finish()


if __name__ == "__main__":
    main()
