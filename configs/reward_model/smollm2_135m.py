"""A reward model from SmolLM2-135M-Instruct and the 300 pairs of dpo_en_demo.

Paper: InstructGPT (arXiv:2203.02155, section 3.5 and appendix C.2): one epoch, cosine to 10 %, the bias set so that
preferred completions score 0. Assets: `python -m launch.fetch smollm2-135m-instruct dpo_en_demo`.
Command: python -m launch.train --config=configs/reward_model/smollm2_135m.py --workdir=runs/reward
Variants: `:ensemble` (4 members, LoRA on one trunk, bootstrapped); `:movie_reviews` (1,600 pairs of sentences of film
reviews by the mean of 15 to 29 people's ratings, asset vader_movie_pairs; larger steps and learning rate);
`:tiny` (seconds, no download).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import preference_config, tiny_preferences
from configs.sft.smollm2_135m import TINY_MODEL


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = preference_config("reward_model")
    config.model.init = "asset:smollm2-135m-instruct"
    config.data.train = "asset:dpo_en_demo"
    config.data.eval = "split:60"
    config.data.max_length = 1024
    config.data.truncate = "drop"
    config.train.epochs = 1.0  # more overfits (InstructGPT, appendix C.2)
    config.train.rows_per_step = 8  # pairs
    config.train.micro_rows = 1
    config.optim.lr = 9e-6
    config.optim.schedule = "cosine"
    config.optim.min_lr_ratio = 0.1
    config.log.every = 1
    config.eval.batch_rows = 8
    config.checkpoint.every = 10
    if variant == "ensemble":
        config.model.lora.rank = 16
        config.optim.lr = 2e-4
        config.reward.members = 4
    elif variant == "movie_reviews":
        config.data.train = "asset:vader_movie_pairs"
        config.data.eval = "split:300"
        config.data.max_length = 256
        config.train.epochs = 0.0
        config.train.steps = 50
        config.train.rows_per_step = 32
        config.optim.lr = 2e-5
        config.optim.warmup = 0.1
    elif variant == "tiny":
        tiny_preferences(config).model.config = dict(TINY_MODEL)
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use ensemble, movie_reviews or tiny")
    return config
