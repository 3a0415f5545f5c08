"""From base model to assistant: Gemma 3 270M base rambles on; it learns to answer and to stop.

Data: alpaca_en_demo (959 conversations trained, 40 held out). The template is Gemma's own turn format; its
`<end_of_turn>` is trained as the end of every answer and carried by the export. Every parameter is trained: in the
base model the embedding of `<end_of_turn>` was never trained (it lies among those of the unused tokens), and LoRA,
which leaves the embedding alone, learned to answer but not to stop (experiments/LOG.md).
Command: python -m launch.train --config=configs/sft/gemma3_270m_assistant.py --workdir=runs/assistant
Time: see experiments/base_to_assistant/README.md (2 CPU cores). Variant: `:tiny`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base_config, tiny
from configs.sft.gemma3_4b import TINY_MODEL

PROMPTS = (
    "What is the capital of France?",
    "Give three tips for staying healthy.",
    "Translate to French: Good morning, my friend.",
    "Write one sentence about the sea.",
    "What is 12 plus 30?",
    "Name two animals that can fly.",
    "Explain in one sentence what photosynthesis is.",
    "Rewrite politely: Give me the report now.",
    "Which is larger, the Earth or the Moon?",
    "Write a short poem about autumn.",
)


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = base_config()
    config.model.init = "asset:gemma-3-270m"
    config.data.train = "asset:alpaca_en_demo"
    config.data.eval = "split:40"
    config.data.max_length = 512
    config.data.chat_template = "configs/templates/gemma.jinja"
    config.train.steps = 60  # two thirds of an epoch: 4 packed rows of 512 tokens a step
    config.train.rows_per_step = 4
    config.optim.lr = 3e-5
    config.optim.warmup = 0.05
    config.optim.min_lr_ratio = 0.1
    config.log.every = 1
    config.eval.batch_rows = 4
    config.eval.prompts = PROMPTS
    config.eval.max_new_tokens = 64
    config.checkpoint.every = 20
    if variant == "tiny":
        tiny(config).model.config = dict(TINY_MODEL)
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
