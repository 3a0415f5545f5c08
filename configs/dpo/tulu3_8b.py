"""Tulu 3 8B: length-normalized DPO.

Paper: Tulu 3 (arXiv:2411.15124, section 5; open-instruct's docs/tulu3.md): beta 5 on mean log-ratios per token,
learning rate 5e-7 (70B: 2e-7), linear with 10 % warm-up, 128 pairs a step, sequences up to 2,048 tokens, one epoch.
Command: python -m launch.train --config=configs/dpo/tulu3_8b.py --workdir=runs/tulu3_dpo
Variant: `:tiny` (seconds, no download). Not run on its own model and data by us.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import PROMPTS, preference_config, tiny_preferences
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = preference_config()
    config.model.init = "allenai/Llama-3.1-Tulu-3-8B-SFT"
    config.model.dtype = "bfloat16"
    config.data.train = "hf:allenai/llama-3.1-tulu-3-8b-preference-mixture"
    config.data.eval = "split:512"
    config.data.max_length = 2048
    config.dpo.loss = "normalized"
    config.dpo.beta = 5.0
    config.train.epochs = 1.0
    config.train.rows_per_step = 128  # pairs
    config.train.micro_rows = 16
    config.optim.lr = 5e-7
    config.optim.schedule = "linear"
    config.optim.warmup = 0.1  # share of the steps
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.eval.every = 500
    config.eval.prompts = PROMPTS
    config.checkpoint.every = 500
    if variant == "tiny":
        tiny_preferences(config).model.config = dict(TINY_MODEL)
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
