"""Chats and families of chat templates that several tests use."""

from __future__ import annotations

import pathlib

TEMPLATES = pathlib.Path(__file__).parent / "templates"
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
# family -> (bos, eos, further special tokens)
FAMILIES = {
    "llama3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"],
    ),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "qwen3": (None, "<|im_end|>", CHATML_TOKENS),
    "llama2": ("<s>", "</s>", []),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
    "zephyr": ("<s>", "</s>", []),
    "phi3": (None, "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
    "deepseek_r1": ("<|begin|>", "<|endofsentence|>", ["<|User|>", "<|Assistant|>"]),
    "generation_tags": (None, "<|im_end|>", CHATML_TOKENS),
    "generation_content_only": (None, "<|im_end|>", CHATML_TOKENS),
    "no_prompt_chatml": (None, "<|im_end|>", CHATML_TOKENS),
}


def chat_row(*turns: str) -> dict[str, list[dict[str, str]]]:
    """Turns of user and assistant in turn, as a row of messages."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}
