"""Llama 3: DPO with the end of the turn masked and the chosen completion's likelihood kept up.

Paper: The Llama 3 Herd of Models (arXiv:2407.21783, section 4.1.4): learning rate 1e-5, beta 0.1, header and
termination tokens masked in both completions (headers are never trained here), plus 0.2 times the negative
log-likelihood of the chosen one. Not printed: batch size, schedule, epochs; those here are ours. Its preference data
is not public: set data.train to your own.
Command: python -m launch.train --config=configs/dpo/llama3_8b.py --config.data.train=PAIRS.jsonl
--workdir=runs/llama3_dpo
Variant: `:tiny` (seconds, no download). Not run on its own model and data by us.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import PROMPTS, preference_config, tiny_preferences
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = preference_config()
    config.model.init = "meta-llama/Llama-3.1-8B-Instruct"
    config.model.dtype = "bfloat16"
    config.data.train = "hf:HuggingFaceH4/ultrafeedback_binarized?split=train_prefs"
    config.data.eval = "split:512"
    config.data.max_length = 2048
    config.dpo.beta = 0.1
    config.dpo.nll_weight = 0.2
    config.dpo.skip_eos = True
    config.train.epochs = 1.0
    config.train.rows_per_step = 128  # pairs; not printed
    config.train.micro_rows = 16
    config.optim.lr = 1e-5
    config.optim.schedule = "cosine"  # not printed
    config.optim.warmup = 0.1  # not printed
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.eval.every = 500
    config.eval.prompts = PROMPTS
    config.checkpoint.every = 500
    if variant == "tiny":
        tiny_preferences(config).model.config = dict(TINY_MODEL)
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
