"""Multiple choice by log-probability (acc, acc_norm and acc_bytes as in lm-eval, arXiv:2405.14782), without examples.

Command: python -m launch.evaluate --model=MODEL --config=configs/eval/multiple_choice.py --out=DIR
By default the 500 test questions of OpenBookQA (arXiv:1809.02789). Variants: `:commonsenseqa` (1,221 validation
questions, arXiv:1811.00937), `:tiny` (4 questions, no download).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.eval.base import eval_config


def get_config(variant: str = "") -> ConfigDict:
    """The evaluation; see the module's docstring for the variants."""
    config = eval_config("multiple_choice")
    config.data.eval = "asset:openbookqa"  # asset:NAME, path, folder, hf:NAME, tfds:NAME
    config.data.prompt = "{question}"  # what stands before a choice; {column} of the row
    config.data.choices = "options"  # the column of the choices
    config.data.answer = "answer"  # the column of the right one: text, letter, or place
    config.data.count_from = "auto"  # places count from 0 or 1; auto: as all rows together say
    config.data.render = "text"  # text, chat, auto (chat where the tokenizer has a template)

    if variant == "commonsenseqa":
        config.data.eval, config.data.prompt = "asset:commonsenseqa", "Question: {question}\nAnswer:"
    elif variant == "tiny":
        config.data.eval, config.data.choices = "configs/tiny/choices.jsonl", "choices"
        config.data.count_from = "0"
        config.eval.batch_rows, config.eval.bootstrap = 2, 100
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use commonsenseqa or tiny")
    return config
