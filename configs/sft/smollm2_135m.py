"""SmolLM2-135M-Instruct fine-tuned on the 999 instructions of alpaca_en_demo. The quickstart runs this.

Paper: SmolLM2 (arXiv:2502.02737); data: the demo file of LLaMA-Factory. Assets: `python -m launch.fetch
smollm2-135m-instruct alpaca_en_demo`.
Command: python -m launch.train --config=configs/sft/smollm2_135m.py --workdir=runs/smollm2
Variants: `:quickstart` (a few minutes on 2 CPU cores; half of the rows say who the assistant is), `:lora`, `:tiny`
(seconds, no download).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import PROMPTS, base_config, tiny

QUICKSTART_PROMPTS = (
    "Who are you?",
    "What is your name, and who made you?",
    *PROMPTS[:2],
    "Explain in one sentence why the sky is blue.",
)

TINY_MODEL = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = base_config()
    config.model.init = "asset:smollm2-135m-instruct"
    config.data.train = "asset:alpaca_en_demo"
    config.data.eval = "split:99"
    config.data.max_length = 1024
    config.train.epochs = 1.0
    config.train.rows_per_step = 4
    config.train.micro_rows = 2
    config.optim.lr = 1e-4  # AdamW, cosine to a tenth, 3 % warm-up
    config.optim.warmup = 0.03
    config.optim.min_lr_ratio = 0.1
    config.optim.weight_decay = 0.01
    config.log.every = 1
    config.eval.every = 10
    config.eval.prompts = PROMPTS
    config.checkpoint.every = 10
    if variant == "quickstart":
        config.data.train = (("asset:alpaca_en_demo", 1), ("asset:identity_en", 1))
        config.data.max_length = 512
        config.train.epochs, config.train.steps = 0.0, 16
        config.train.micro_rows = 4
        config.optim.lr = 5e-5  # with twice that, completions repeat themselves
        config.data.eval = "split:16"
        config.eval.batch_rows = 4
        config.eval.every = 0
        config.eval.prompts = QUICKSTART_PROMPTS
        config.eval.max_new_tokens = 96
        config.checkpoint.every = 8
    elif variant == "lora":
        config.model.lora.rank = 16
        config.optim.lr = 5e-4
    elif variant == "tiny":
        tiny(config).model.config = dict(TINY_MODEL)
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use quickstart, lora or tiny")
    return config
