"""Summaries of Reddit posts by PPO, with every detail of its reproduction by Huang et al.

Paper: The N+ Implementation Details of RLHF with PPO: A Case Study on TL;DR Summarization (arXiv:2403.17031): 512
prompts an iteration of at most 512 tokens, 53 tokens at temperature 0.7, one minibatch, 4 epochs, AdamW with eps 1e-5,
3e-6 falling to 0, beta 0.05, gamma 1, lambda 0.95, clips 0.2, value coefficient 0.1; -1 for a summary without an end
(detail 23), the value network from the reward model (22), rewards not whitened (24), advantages whitened (25); a
million completions; evaluated at temperature 0.01. Their policies are Pythia models, whose family is not among ours,
fine-tuned on the summaries for an epoch (AdamW, 3e-6, cosine, batch 128), their reward models these for an epoch
(batch 64): make both first and name them,
  --config.model.init=SFT_MODEL --config.score.models="('REWARD_MODEL',)" --config.ppo.value=REWARD_MODEL
Command: python -m launch.train --config=configs/ppo/tldr.py --workdir=runs/tldr (and the above)
Variant: `:tiny` (seconds, no download, another reward). Not run at its own size by us.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import online_config, tiny_prompts
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = online_config()
    config.model.init = "runs/tldr_sft"
    config.model.dtype = "bfloat16"
    config.data.train = "hf:trl-lib/tldr?split=train"
    config.data.eval = "hf:trl-lib/tldr?split=validation"
    config.data.max_length = 565  # 512 and 53
    config.data.long_prompts = "drop"  # the paper cuts them at a line's end
    config.rollout.max_new_tokens = 53
    config.rollout.temperature = 0.7
    config.score.models = ("runs/tldr_reward",)
    config.score.missing_eos = "replace"
    config.score.missing_eos_value = -1.0
    config.ppo.value = "runs/tldr_reward"
    config.ppo.epochs = 4
    config.ppo.minibatches = 1
    config.ppo.kl_coefficient = 0.05
    config.train.rows_per_step = 512
    config.train.micro_rows = 64
    config.train.steps = 1953  # a million completions
    config.optim.lr = 3e-6
    config.optim.eps = 1e-5
    config.optim.clip_norm = 0.0
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.log.every = 1
    config.eval.every = 100
    config.eval.temperature = 0.01
    config.checkpoint.every = 100
    if variant == "tiny":
        tiny_prompts(config).model.config = dict(TINY_MODEL)
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
