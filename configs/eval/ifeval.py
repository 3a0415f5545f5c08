"""IFEval (arXiv:2311.07911): 541 prompts with 834 instructions that a program can check, strictly and loosely.

Command: python -m launch.evaluate --model=MODEL --config=configs/eval/ifeval.py --out=DIR
Needs the extra [eval]. Greedy, at most 1,280 new tokens, as in lm-eval. `--config.data.first=32` takes the first 32
prompts. Variants: `:tiny` (4 prompts, no download).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.eval.base import eval_config


def get_config(variant: str = "") -> ConfigDict:
    """The evaluation; see the module's docstring for the variants."""
    config = eval_config("ifeval")
    config.eval.max_new_tokens = 1280
    config.data.eval = "asset:ifeval"  # or any rows with prompt, instruction_id_list, kwargs
    config.data.prompt = "{prompt}"  # {column} of the row

    if variant == "tiny":
        config.data.eval = "configs/tiny/instructions.jsonl"
        config.eval.max_new_tokens, config.eval.batch_rows, config.eval.bootstrap = 8, 2, 100
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
