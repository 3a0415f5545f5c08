"""DPO on SmolLM2-135M-Instruct with the 300 pairs of dpo_en_demo.

Paper: DPO (arXiv:2305.18290); beta 0.1 as in its section 6. Data: the demo file of LLaMA-Factory. Assets:
`python -m launch.fetch smollm2-135m-instruct dpo_en_demo`.
Command: python -m launch.train --config=configs/dpo/smollm2_135m.py --workdir=runs/dpo
Variants: `:quickstart` (a minute or two on 2 CPU cores), `:lora`, `:tiny` (seconds, no download).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import PROMPTS, preference_config, tiny_preferences
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = preference_config()
    config.model.init = "asset:smollm2-135m-instruct"
    config.data.train = "asset:dpo_en_demo"
    config.data.eval = "split:60"
    config.data.max_length = 1024
    config.data.truncate = "drop"
    config.train.epochs = 1.0
    config.train.rows_per_step = 8  # pairs
    config.train.micro_rows = 1
    config.optim.lr = 2e-5  # AdamW, linear to 0, 10 % warm-up; papers take 5e-7 over thousands of steps
    config.optim.schedule = "linear"
    config.optim.warmup = 0.1
    config.log.every = 1
    config.eval.batch_rows = 8
    config.eval.prompts = PROMPTS
    config.checkpoint.every = 10
    if variant == "quickstart":
        config.data.max_length = 384  # 41 of the pairs: the reference reads all of them, the 6 steps need 24
        config.data.eval = "split:20"
        config.train.epochs, config.train.steps = 0.0, 6
        config.train.rows_per_step = 4
        config.eval.prompts = ()
        config.checkpoint.every = 4
    elif variant == "lora":
        config.model.lora.rank = 16
        config.dpo.reference = "adapter"
        config.optim.lr = 2e-4
    elif variant == "tiny":
        tiny_preferences(config).model.config = dict(TINY_MODEL)
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use quickstart, lora or tiny")
    return config
