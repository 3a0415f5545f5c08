"""Arithmetic and word problems, checked by math-verify: share of right results.

Command: python -m launch.evaluate --model=MODEL --config=configs/eval/math.py --out=DIR
Needs the extra [eval]. By default 100 word problems of GSM8K (arXiv:2110.14168). Variants: `:asdiv` (word problems
of ASDiv whose answer is a number), `:arithmetic` (200 problems of the kinds of GPT-3, arXiv:2005.14165, made
from the seed), `:tiny` (4 of these, no download).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.eval.base import eval_config


def get_config(variant: str = "") -> ConfigDict:
    """The evaluation; see the module's docstring for the variants."""
    config = eval_config("math")
    ask = "\nSolve it step by step, and end with the result in a line of its own: #### RESULT"
    config.data.eval = "asset:gsm8k_100"  # arithmetic:COUNT, asset:NAME, path, folder, hf:NAME, tfds:NAME
    config.data.prompt = "{text_clean}" + ask  # {column} of the row
    config.data.answer = "target_answer"  # the column of the right result, "42" or "... #### 42"

    if variant == "asdiv":
        config.data.eval, config.data.prompt = "asset:asdiv", "{passage} {question}" + ask
        config.data.answer, config.data.on_bad_row = "answer", "skip"  # names, times, ratios, lists
    elif variant in ("arithmetic", "tiny"):
        config.data.eval, config.data.prompt, config.data.answer = "arithmetic:200", "{question}", "answer"
        config.eval.max_new_tokens = 64
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use asdiv, arithmetic or tiny")
    if variant == "tiny":
        config.data.eval = "arithmetic:4"
        config.eval.max_new_tokens, config.eval.batch_rows, config.eval.bootstrap = 8, 2, 100
    return config
