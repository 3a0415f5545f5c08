"""Prompts to ids and back: templates, BOS, pieces of text."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.sampling.prompts import encode_chat, encode_text, text_pieces


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_a_chat_ends_where_the_assistant_starts_to_write(tokenizer):
    ids = encode_chat(tokenizer, [{"role": "user", "content": "Hé?"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n"
    assert ids.dtype == np.int32


def test_a_chat_needs_a_template_that_takes_it(tokenizer):
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encode_chat(bare, [{"role": "user", "content": "Hi"}])
    bare.chat_template = "{{ raise_exception('only users may speak') }}"
    with pytest.raises(InputError, match="refuses them: only users may speak"):
        encode_chat(bare, [{"role": "user", "content": "Hi"}])


def test_plain_text_gets_one_bos_where_the_tokenizer_adds_one(tokenizer, gemma_gguf):
    from posttrain_jax.models.io.tokenizer import load_tokenizer

    assert tokenizer.decode(encode_text(tokenizer, "a b")) == "a b"
    gemma = load_tokenizer(gemma_gguf)
    assert encode_text(gemma, "a b").tolist()[0] == gemma.bos_token_id
    assert encode_text(gemma, "<bos>a b").tolist() == encode_text(gemma, "a b").tolist()
    assert gemma.eos_token_id not in encode_text(gemma, "a b").tolist()


def test_pieces_join_to_the_text_and_never_cut_a_character(tokenizer):
    """Every byte is a token here, so each of these characters takes two to four tokens."""
    text = "Grüße, 世界 🙂!"
    pieces = list(text_pieces(tokenizer, encode_text(tokenizer, text).tolist()))
    assert "".join(pieces) == text
    assert pieces == list(text)
    stop = tokenizer.eos_token_id
    assert "".join(text_pieces(tokenizer, [*encode_text(tokenizer, "ok").tolist(), stop])) == "ok"
