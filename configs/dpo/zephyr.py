"""Zephyr-7B-beta: distilled DPO.

Paper: Zephyr (arXiv:2310.16944, section 4): beta 0.1, peak learning rate 5e-7, linear with 10 % warm-up, 32 pairs a
step, 3 epochs, on UltraFeedback binarized, from a Mistral-7B fine-tuned on UltraChat.
Command: python -m launch.train --config=configs/dpo/zephyr.py --workdir=runs/zephyr
Variant: `:tiny` (seconds, no download). Not run on its own model and data by us.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import PROMPTS, preference_config, tiny_preferences
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = preference_config()
    config.model.init = "alignment-handbook/zephyr-7b-sft-full"
    config.model.dtype = "bfloat16"
    config.data.train = "hf:HuggingFaceH4/ultrafeedback_binarized?split=train_prefs"
    config.data.eval = "hf:HuggingFaceH4/ultrafeedback_binarized?split=test_prefs"
    config.data.max_length = 1024
    config.dpo.beta = 0.1
    config.train.epochs = 3.0
    config.train.rows_per_step = 32  # pairs
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
