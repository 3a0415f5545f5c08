"""Held-out loss and perplexity, per token and per sequence, with 95 % bootstrap intervals over sequences.

Command: python -m launch.evaluate --model=MODEL --config=configs/eval/held_out.py --out=DIR
Where data.train and data.eval are "", a workdir is evaluated on the rows that its run held out, tokenized as it did;
any other MODEL on the 99 rows that configs/sft/smollm2_135m.py holds out of alpaca_en_demo (about a minute for
SmolLM2-135M on 2 CPU cores). What is read is printed first. Variants: `:tiny` (seconds, no download).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.eval.base import eval_config


def get_config(variant: str = "") -> ConfigDict:
    """The evaluation; see the module's docstring for the variants."""
    config = eval_config("held_out")  # its seed is also that of a "split:" given here
    config.eval.batch_rows = 4
    if variant == "tiny":
        config.data.train = "configs/tiny/chats.jsonl"
        config.data.eval = "split:0.2"
        config.data.max_length = 256
        config.eval.batch_rows, config.eval.bootstrap = 2, 100
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
