"""Qwen3 4B base, instruction-tuned with Tulu 3's hyper-parameters.

Paper: Tulu 3 (arXiv:2411.15124), supervised fine-tuning: learning rate 5e-6, linear decay, 3 % warm-up, 2 epochs,
128 sequences a step, 4,096 tokens, no weight decay, the loss a sum over tokens divided by the global count.
Command: python -m launch.train --config=configs/sft/qwen3_4b.py --workdir=runs/qwen3_4b
(a TPU slice or 4 x 80 GB GPUs).
Sequences are packed here; the paper pads them.
Variant: `:tiny` (seconds, no download).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import PROMPTS, base_config, tiny

TINY_MODEL = {
    "model_type": "qwen3",
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = base_config()
    config.model.init = "Qwen/Qwen3-4B-Base"
    config.model.dtype = "bfloat16"
    config.data.train = "hf:allenai/tulu-3-sft-mixture"
    config.data.eval = "split:512"
    config.data.max_length = 4096
    config.train.epochs = 2.0
    config.train.rows_per_step = 64  # packed rows; about as many tokens as the paper's 128 sequences
    config.train.remat = "mlp"
    config.optim.lr = 5e-6
    config.optim.schedule = "linear"
    config.optim.warmup = 0.03
    config.optim.weight_decay = 0.0
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.eval.every = 500
    config.eval.prompts = PROMPTS
    config.checkpoint.every = 500
    config.checkpoint.best_metric = "eval/loss"
    if variant == "tiny":
        tiny(config).model.config = dict(TINY_MODEL)
        config.train.remat = "elementwise"
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
