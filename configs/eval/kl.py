"""How far a model has moved from its reference: KL(policy || reference) on answers that the policy writes.

Command: python -m launch.evaluate --model=runs/dpo --config=configs/eval/kl.py --out=DIR
k1 and k3 (Schulman, "Approximating KL divergence", 2020) per answer and per token, and the length of the answers, with
intervals over prompts. By default a workdir answers the first 32 prompts that its run held out, encoded as the run
does, beside the model that the run started from; any other MODEL needs reference.model, and answers the first 32
instructions of alpaca_en_demo. Variant: `:tiny` (two short prompts).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.eval.base import eval_config


def get_config(variant: str = "") -> ConfigDict:
    """The evaluation; see the module's docstring for the variants."""
    config = eval_config("kl")
    config.data.eval = ""  # rows to ask: asset:NAME, path, folder, hf:NAME, tfds:NAME; "" = as said above
    config.data.prompt = "{instruction}"  # {column} of a row of data.eval
    config.data.first = 32  # only so many rows; 0 = all
    config.eval.max_new_tokens = 128  # the KL is that of answers cut off here
    config.eval.num_samples = 1  # answers to each prompt, drawn at temperature 1
    if variant == "tiny":
        config.data.eval, config.data.first = "configs/tiny/instructions.jsonl", 2
        config.data.prompt = "{prompt}"
        config.eval.max_new_tokens, config.eval.batch_rows, config.eval.bootstrap = 8, 2, 100
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
