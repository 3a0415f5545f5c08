"""The SmolLM2 tokenizer, and copies of it that carry other families' special tokens and chat templates."""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from posttrain_jax.models.io.tokenizer import load_tokenizer

from .chats import FAMILIES, TEMPLATES


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: pathlib.Path) -> PreTrainedTokenizerFast:
    """The real SmolLM2-135M-Instruct tokenizer with its own (ChatML) template; pad is eos."""
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="session")
def family(smollm2: PreTrainedTokenizerFast) -> Callable[[str], PreTrainedTokenizerFast]:
    """A function from a family's name to a tokenizer with its special tokens and template."""
    made: dict[str, PreTrainedTokenizerFast] = {"smollm2": smollm2}

    def make(name: str) -> PreTrainedTokenizerFast:
        if name not in made:
            bos, eos, others = FAMILIES[name]
            tokenizer = copy.deepcopy(smollm2)
            tokenizer.add_special_tokens(
                {
                    "bos_token": bos or "<|im_start|>",
                    "eos_token": eos,
                    "pad_token": eos,
                    "extra_special_tokens": others,
                }
            )
            tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
            made[name] = tokenizer
        return made[name]

    return make


@pytest.fixture
def write_jsonl(tmp_path: pathlib.Path) -> Callable[..., str]:
    """Writes rows as JSON Lines and returns the path."""

    def write(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def gemma_tokenizer(gemma_gguf):
    return load_tokenizer(gemma_gguf)
