"""What every evaluation has: seed, bootstrap, model and mesh."""

from __future__ import annotations

from ml_collections import ConfigDict


def eval_config(task: str) -> ConfigDict:
    """The keys that all tasks share, with their defaults; `data` is empty."""
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()

    config.eval = ConfigDict()
    config.eval.task = task  # held_out, ifeval, math, multiple_choice, kl
    config.eval.batch_rows = 16  # at once, over all devices
    config.eval.bootstrap = 1000  # resamples; 0 = no intervals

    config.model = ConfigDict()
    config.model.dtype = "float32"  # compute dtype
    config.model.attention = "auto"  # auto, xla, cudnn (GPU), splash (TPU)
    config.model.ema = (
        False  # of a workdir: the moving average of the weights, also where eval.weights was raw
    )

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1 = the devices that are left
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    return config


def answers(config: ConfigDict, *, max_new_tokens: int) -> None:
    """Adds the keys of a task that checks what the model writes."""
    config.data.render = "auto"  # chat, text, auto (chat where the tokenizer has a template)
    config.data.chat_template_kwargs = ""  # variables of the template, as JSON: {"enable_thinking": false}
    config.eval.max_new_tokens = max_new_tokens
    config.eval.temperature = 0.0  # 0 = greedy
    config.eval.stop = ()  # texts that end an answer, such as ("\nQuestion:",) for a base model
