"""TRL: its PPOTrainer (trl.experimental.ppo, last seen in 1.12.0) or its RLOOTrainer, unchanged but for being timed."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl

from experiments.bench.rollouts_contract import (
    BETA,
    CLIP,
    EPOCHS,
    LR,
    Recorder,
    Settings,
    load_head,
    load_prompts,
    parse_settings,
)
from experiments.bench.trl_arguments import trl_arguments


def arguments_of(settings: Settings, folder: str) -> dict[str, Any]:
    """An iteration's answers in passes of `together`."""
    answers = settings.prompts * settings.samples
    if answers % settings.together:
        raise SystemExit(f"error: {answers} answers do not divide into {settings.together} at a time")
    return trl_arguments(folder, at_once=settings.together, accumulated=answers // settings.together, lr=LR)


def policy(settings: Settings) -> Any:
    """The language model."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        settings.rows / "model", dtype=torch.float32, attn_implementation="sdpa"
    )


def scorer(settings: Settings) -> Any:
    """A model with a score head, for rewards and values."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        settings.rows / "model", dtype=torch.float32, attn_implementation="sdpa", num_labels=1
    )
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(load_head(settings.rows).T))
    return model


class Iterations(transformers.TrainerCallback):
    """Tells the recorder where each iteration ends, by what the trainer has logged."""

    def __init__(self, recorder: Recorder, names: dict[str, str], new_tokens: int) -> None:
        self.recorder, self.names, self.new_tokens = recorder, names, new_tokens
        self.logged: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The loop starts."""
        self.recorder.start()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """An iteration's metrics come right before or after its end; `total` comes at the very end."""
        if logs and self.names["kl"] in logs:
            length = float(logs.get(self.names["length"], self.new_tokens))
            self.recorder.iteration(completion_tokens=length, kl=float(logs[self.names["kl"]]), parts={})


def run_ppo(settings: Settings, recorder: Recorder, folder: str) -> None:
    """Policy, value network, reference and reward model, 4 epochs."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.rows / "model", padding_side="left")
    prompts = [{"input_ids": tokenizer(text)["input_ids"]} for text in load_prompts(settings.rows)]
    model, reference, value, reward = (
        policy(settings),
        policy(settings),
        scorer(settings),
        scorer(settings),
    )
    config = PPOConfig(
        **arguments_of(settings, folder),
        total_episodes=settings.prompts * settings.samples * settings.iterations,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS["ppo"],
        local_rollout_forward_batch_size=settings.together,
        num_sample_generations=0,
        response_length=settings.new_tokens,
        stop_token="eos",
        temperature=1.0,
        kl_coef=BETA,
        cliprange=CLIP,
        cliprange_value=CLIP,
        gamma=1.0,
        lam=0.95,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=model,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_list(prompts),
        callbacks=[Iterations(recorder, {"kl": "objective/kl", "length": "none"}, settings.new_tokens)],
    )
    # Its train() does not call on_train_begin before models and data are where they belong.
    recorder.start()
    trainer.train()


def token_counts(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward: how many tokens an answer has."""
    return [float(len(ids)) for ids in completion_ids]


def run_rloo(settings: Settings, recorder: Recorder, folder: str) -> None:
    """Policy and reference, a reward function, one update."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.rows / "model")
    answers = settings.prompts * settings.samples
    config = trl.RLOOConfig(
        **arguments_of(settings, folder),
        max_steps=settings.iterations,
        logging_steps=1,
        num_generations=settings.samples,
        generation_batch_size=answers,
        max_completion_length=settings.new_tokens,
        num_iterations=EPOCHS["rloo"],
        beta=BETA,
        epsilon=CLIP,
        temperature=1.0,
        disable_dropout=True,
    )
    trainer = trl.RLOOTrainer(
        model=policy(settings),
        reward_funcs=token_counts,
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in load_prompts(settings.rows)]),
        processing_class=tokenizer,
        callbacks=[
            Iterations(recorder, {"kl": "kl", "length": "completions/mean_length"}, settings.new_tokens)
        ],
    )
    trainer.train()


def main() -> None:
    """Runs the iterations and prints the line."""
    settings = parse_settings(__doc__)
    torch.set_num_threads(settings.threads)
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    recorder = Recorder("trl", settings, versions)
    with tempfile.TemporaryDirectory() as folder:
        {"ppo": run_ppo, "rloo": run_rloo}[settings.setting](settings, recorder, folder)
    recorder.finish()


if __name__ == "__main__":
    main()
