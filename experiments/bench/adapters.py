"""The adapters that the PyTorch sides train: PEFT, on all seven linear layers."""

from __future__ import annotations

import peft
import transformers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_config(rank: int) -> peft.LoraConfig:
    """Rank, alpha = 2 * rank, no dropout."""
    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )


def add_lora(model: transformers.PreTrainedModel, rank: int) -> peft.PeftModel:
    """The model with adapters, its own parameters frozen."""
    return peft.get_peft_model(model, lora_config(rank))
