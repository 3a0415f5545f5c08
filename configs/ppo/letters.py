"""PPO on a task whose optimum is known: a tiny model from scratch learns to write nothing but "e".

The reward is the share of "e" in a completion, so 1 is the optimum; a new model begins near 1/256. It is the check that
the loop learns at all (`experiments/ppo_letters`, 5 seeds).
Command: python -m launch.train --config=configs/ppo/letters.py --workdir=runs/letters
Variants: `:rloo` (the same by RLOO), `:tiny` (seconds, to see that it runs).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import online_config, tiny_prompts
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = tiny_prompts(online_config("rloo" if variant == "rloo" else "ppo"))
    config.model.config = dict(TINY_MODEL)
    config.rollout.max_new_tokens = 12
    config.rollout.samples = 4
    config.rollout.max_logp_difference = 0.01  # all is float32
    config.train.steps = 60
    config.optim.lr = 3e-3
    config.optim.schedule = "constant"
    config.log.every = 5
    config.eval.every = 0
    config.checkpoint.every = 0
    if variant == "rloo":
        config.rloo.kl_coefficient = 0.0
        config.rloo.epochs, config.rloo.minibatches = 2, 2
    else:
        config.ppo.kl_coefficient = 0.0
        config.ppo.epochs, config.ppo.minibatches = 4, 2
    if variant == "tiny":
        config.train.steps = 4
        config.log.every = 1
        config.checkpoint.every = 2
    elif variant not in ("", "rloo"):
        raise ValueError(f"unknown variant {variant!r}; use rloo or tiny")
    return config
