"""Chats and families of chat templates that several tests use."""

from __future__ import annotations

import pathlib

import numpy as np
from transformers import PreTrainedTokenizerFast

from posttrain_jax.data.chat import Encoded, encode
from posttrain_jax.data.formats import to_conversation

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


TWO_TURNS = chat_row("What is 2+2?", "It is 4.", "And 3+3?", "6\n\nSix — 六!")


def trained_texts(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Each unbroken run of trained tokens, decoded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.loss_mask.astype(np.int8), [0]])))
    return [tokenizer.decode(encoded.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def encode_row(row: dict, tokenizer: PreTrainedTokenizerFast, **options: str) -> Encoded:
    return encode(to_conversation(row), tokenizer, **options)


def template_ids(row: dict, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    conversation = to_conversation(row)
    return tokenizer.apply_chat_template(
        list(conversation.messages), tools=conversation.tools, tokenize=True, return_dict=False
    )
