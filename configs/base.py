"""Every key of an experiment with its default. A config starts from here and changes what its paper changes."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from posttrain_jax.core.schema import Sections, all_defaults
from posttrain_jax.wiring.algorithms import sections_of

# What a chat model is asked at every evaluation, so that its change can be read.
PROMPTS = (
    "What is the capital of France?",
    "Give three tips for staying healthy.",
    "Rewrite this sentence in the passive voice: The cat chased the mouse.",
)


def experiment_config(algorithm: str) -> ConfigDict:
    """Every key of an algorithm's config with its default; `launch.train --describe` says what each means."""
    config = config_dict(sections_of(algorithm))
    config.algorithm = algorithm
    return config


def config_dict(sections: Sections) -> ConfigDict:
    """Sections with their defaults; the schema checks the types when a config is read."""
    values = all_defaults(sections)
    values |= {name: _section(values[name]) for name in sections if name}
    return ConfigDict(values, type_safe=False, convert_dict=False)


def _section(values: dict[str, Any]) -> ConfigDict:
    """A section with its keys; JSON objects stay dictionaries."""
    if "lora" in values:
        values = values | {"lora": _section(values["lora"])}
    return ConfigDict(values, type_safe=False, convert_dict=False)


def base_config() -> ConfigDict:
    """Supervised fine-tuning."""
    return experiment_config("sft")


def preference_config(algorithm: str = "dpo") -> ConfigDict:
    """Learning from preferences: dpo, kto or reward_model.

    `train.rows_per_step` counts prompts (for pairs: comparisons); `train.micro_rows` counts packed rows.
    """
    return experiment_config(algorithm)


def online_config(algorithm: str = "ppo") -> ConfigDict:
    """Learning from the policy's own completions: ppo or rloo.

    `train.rows_per_step` counts prompts; `train.micro_rows` counts completions; `data.max_length` holds a prompt with
    its completion. A step is an iteration: completions, then all updates on them.
    """
    config = experiment_config(algorithm)
    config.optim.eps = 1e-5
    config.optim.schedule = "linear"
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """Turns an experiment into one of the same shape that takes seconds on a CPU and needs no download."""
    config.model.init = "random"
    config.model.tokenizer = "bytes"
    config.model.dtype = "float32"
    config.data.train = "configs/tiny/chats.jsonl"
    config.data.eval = "split:0.2"
    config.data.max_length = 256
    config.data.chat_template = ""
    config.train.steps = 4
    config.train.epochs = 0.0
    config.train.rows_per_step = 4
    config.train.micro_rows = 0
    config.optim.lr = 1e-3
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
    config.log.every = 1
    config.eval.every = 2
    if "batch_rows" in config.eval:
        config.eval.batch_rows = 2
        config.eval.max_new_tokens = 8
        config.eval.prompts = config.eval.prompts[:1]
    config.checkpoint.every = 2
    return config


def tiny_preferences(config: ConfigDict) -> ConfigDict:
    """`tiny` for an experiment on preferences."""
    tiny(config)
    config.data.train = "configs/tiny/pairs.jsonl"
    config.data.eval = "split:6"
    config.data.row_length = 0
    config.data.truncate = "right"
    config.train.micro_rows = 0
    return config


def tiny_prompts(config: ConfigDict) -> ConfigDict:
    """`tiny` for an experiment on the policy's own answers: its reward is the share of the letter "e" in them."""
    tiny(config)
    config.data.train = "configs/tiny/prompts.jsonl"
    config.data.eval = "split:2"
    config.data.max_length = 48
    config.data.long_prompts = "error"
    config.rollout.max_new_tokens = 8
    config.rollout.truncate_token, config.rollout.truncate_after = -1, 0
    config.score.functions, config.score.models = ("configs.tiny.rewards:share_of_e",), ()
    config.score.normalize = 0  # a new model's answers hold no "e"
    config.score.workers = 1
    if "ppo" in config and config.ppo.value not in ("policy", "shared"):
        config.ppo.value = "policy"
    config.train.rows_per_step = 8
    return config
