"""What every TRL side has in common: float32 on the CPU, AdamW at a constant rate, no evaluation, no saving."""

from __future__ import annotations

from typing import Any


def trl_arguments(folder: str, *, at_once: int, accumulated: int, lr: float) -> dict[str, Any]:
    """Arguments of any of TRL's configs but PPO's own.

    Args:
      folder: for what the trainer writes.
      at_once: rows of a forward and backward pass.
      accumulated: such passes in a step.
      lr: learning rate.
    """
    return {
        "output_dir": folder,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
