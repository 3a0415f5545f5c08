"""The section `model` of a config: which model is trained, and how it is computed."""

from __future__ import annotations

import dataclasses
from typing import Any

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import check, section, setting
from posttrain_jax.models.config import LoraConfig


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model to train."""

    init: str = setting("", 'a MODEL, or "random" with model.config')
    config: dict[str, Any] = setting({}, 'for "random": the fields of a Hugging Face config.json')
    tokenizer: str = setting("", '"" = of model.init; a MODEL; or "bytes"')
    dtype: str = setting("float32", "compute dtype; parameters are float32", choices=("float32", "bfloat16"))
    attention: str = setting(
        "auto",
        "implementation; cudnn needs a GPU, splash a TPU",
        choices=("auto", "xla", "blocks", "cudnn", "splash"),
    )
    lora: LoraConfig = section(LoraConfig)

    def __post_init__(self) -> None:
        check(self, "model")
        check(self.lora, "model.lora")
        known = LoraConfig().targets
        if self.lora.rank and not (self.lora.targets and set(self.lora.targets) <= set(known)):
            raise InputError(
                f"model.lora.targets is {str(self.lora.targets)[:80]}; use some of {', '.join(known)}."
            )
