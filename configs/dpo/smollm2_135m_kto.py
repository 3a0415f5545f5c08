"""KTO on SmolLM2-135M-Instruct with the 300 labeled completions of kto_en_demo.

Paper: KTO (arXiv:2402.01306): beta 0.1, lambda_D = lambda_U = 1 for as many good as bad examples, AdamW at 5e-6.
Data: the demo file of LLaMA-Factory. Assets: `python -m launch.fetch smollm2-135m-instruct kto_en_demo`.
Command: python -m launch.train --config=configs/dpo/smollm2_135m_kto.py --workdir=runs/kto
Variant: `:tiny` (seconds, no download).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import PROMPTS, preference_config, tiny_preferences
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = preference_config("kto")
    config.model.init = "asset:smollm2-135m-instruct"
    config.data.train = "asset:kto_en_demo"
    config.data.eval = "split:60"
    config.data.max_length = 1024
    config.data.truncate = "drop"
    config.train.epochs = 1.0
    config.train.rows_per_step = 8  # labeled completions
    config.train.micro_rows = 1
    config.optim.lr = 5e-6
    config.optim.schedule = "linear"
    config.optim.warmup = 0.1
    config.log.every = 1
    config.eval.batch_rows = 8
    config.eval.prompts = PROMPTS
    config.checkpoint.every = 10
    if variant == "tiny":
        tiny_preferences(config).model.config = dict(TINY_MODEL)
        config.data.train = "configs/tiny/labels.jsonl"
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
