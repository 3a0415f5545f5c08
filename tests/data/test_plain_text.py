"""Text without a chat template: a prompt and its completion, and text that is trained whole."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from posttrain_jax.core.errors import InputError

from .chats import encode_row, trained_texts


def test_prompt_and_completion_text(smollm2):
    encoded = encode_row({"prompt": "The capital of France is", "completion": " Paris."}, smollm2)
    assert trained_texts(encoded, smollm2) == [" Paris.<|im_end|>"]
    prompt = smollm2("The capital of France is")["input_ids"]
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert not encoded.loss_mask[: len(prompt)].any()


def test_a_completion_never_changes_the_prompts_tokens(smollm2):
    """ "un" + "believable" joined would be other tokens than the prompt has when the model generates."""
    encoded = encode_row({"prompt": "This is un", "completion": "believable"}, smollm2)
    prompt = smollm2("This is un")["input_ids"]
    assert smollm2("This is unbelievable")["input_ids"][: len(prompt)] != prompt
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert trained_texts(encoded, smollm2) == ["believable<|im_end|>"]


def test_text_is_trained_whole_with_eos(smollm2):
    encoded = encode_row({"text": "Once upon a time"}, smollm2)
    assert smollm2.decode(encoded.tokens) == "Once upon a time<|im_end|>"
    assert encoded.loss_mask.tolist() == [False] + [True] * (len(encoded.tokens) - 1)


def test_an_eos_in_the_text_is_not_doubled(smollm2):
    encoded = encode_row({"prompt": "a", "completion": "b<|im_end|>"}, smollm2)
    assert encoded.tokens.tolist().count(smollm2.eos_token_id) == 1


def test_bos_is_added_once_by_a_tokenizer_that_adds_one(gemma_tokenizer):
    bos, eos = gemma_tokenizer.bos_token_id, gemma_tokenizer.eos_token_id
    for row in ({"text": "Hello"}, {"text": "<bos>Hello"}):
        encoded = encode_row(row, gemma_tokenizer)
        assert encoded.tokens.tolist() == [
            bos,
            *gemma_tokenizer("Hello", add_special_tokens=False)["input_ids"],
            eos,
        ]
        assert encoded.loss_mask.tolist() == [False, True, True]
    encoded = encode_row({"prompt": "Hello", "completion": " you"}, gemma_tokenizer)
    assert encoded.tokens[0] == bos and trained_texts(encoded, gemma_tokenizer) == [" you<eos>"]


def test_no_eos_is_refused(smollm2):
    bare = PreTrainedTokenizerFast(tokenizer_object=smollm2.backend_tokenizer)
    with pytest.raises(InputError, match="no EOS"):
        encode_row({"text": "a"}, bare)
