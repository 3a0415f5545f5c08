"""DPO as its authors' code trains it.

Paper: Direct Preference Optimization (arXiv:2305.18290, appendix B) and its repository: RMSprop, learning rate 5e-7
after 150 steps of linear warm-up (the paper's appendix prints 1e-6), then constant; beta 0.1; 64 pairs a step; sums
over the completion's tokens; sequences cut at 512 tokens; gradient norm clipped at 10; one epoch. Their data is
Anthropic's HH (`hf:Anthropic/hh-rlhf`, implicit prompts), their model Pythia 2.8B, whose family is not among ours,
after fine-tuning on the chosen completions: set model.init to a model of your own made so. Our warm-up reaches the
peak one step before theirs.
Command: python -m launch.train --config=configs/dpo/dpo_paper.py --config.model.init=SFT_MODEL
--workdir=runs/dpo_paper
Variant: `:tiny` (seconds, no download). Not run on its own model and data by us.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import preference_config, tiny_preferences
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = preference_config()
    config.model.init = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    config.data.train = "hf:Anthropic/hh-rlhf"
    config.data.eval = "hf:Anthropic/hh-rlhf?split=test"
    config.data.max_length = 512  # config.yaml: max_length
    config.dpo.beta = 0.1
    config.train.epochs = 1.0
    config.train.rows_per_step = 64  # config.yaml: batch_size, pairs
    config.train.micro_rows = 16
    config.optim.name = "rmsprop"
    config.optim.beta2 = 0.99  # PyTorch's alpha
    config.optim.lr = 5e-7  # config.yaml: lr
    config.optim.schedule = "constant"
    config.optim.warmup = 150  # config.yaml: warmup_steps
    config.optim.clip_norm = 10.0  # config.yaml: max_grad_norm
    config.eval.every = 312  # about 20,000 pairs (config.yaml: eval_every)
    config.checkpoint.every = 312
    if variant == "tiny":
        tiny_preferences(config).model.config = dict(TINY_MODEL)
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
