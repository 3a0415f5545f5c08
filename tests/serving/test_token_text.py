"""Tokens to text: whole characters only, stop strings held back, and every token's own bytes."""

from __future__ import annotations

import pytest

from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.tokenizer import load_tokenizer
from posttrain_jax.sampling.prompts import REPLACEMENT, encode_text
from posttrain_jax.serving.token_text import LONGEST_WINDOW, Detokenizer, Vocabulary, held_back

TEXT = "Grüße, 世界 🙂!  Two spaces,\n\tand a tab. "


@pytest.fixture(scope="module")
def byte():
    return byte_tokenizer()


@pytest.fixture(params=["byte", "smollm2", "gemma"])
def tokenizer(request, byte):
    """One token a byte; byte-level BPE; SentencePiece with byte fallback."""
    if request.param == "byte":
        return byte
    name = {"smollm2": "smollm2_gguf", "gemma": "gemma_gguf"}[request.param]
    return load_tokenizer(request.getfixturevalue(name))


def pieces_of(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in ids), detokenizer.rest()]


def test_pieces_join_to_the_text_and_never_hold_half_a_character(tokenizer):
    ids = encode_text(tokenizer, TEXT).tolist()
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_special_token_in_the_middle_shows_nothing_and_costs_no_space(tokenizer):
    ids = encode_text(tokenizer, "one").tolist()
    ids += [tokenizer.eos_token_id] * 3 + encode_text(tokenizer, " two three").tolist()
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_bytes_that_are_no_text_come_out_as_they_would_at_once(byte):
    """0xFF can start no character; 0xE4 0xB8 starts one of three bytes and is the end of the text."""
    bad, *start = byte.convert_tokens_to_ids([chr(0xFF), chr(0xE4), chr(0xB8)])
    ids = encode_text(byte, "a").tolist() + [bad] * (2 * LONGEST_WINDOW) + start
    pieces = pieces_of(byte, ids)
    assert "".join(pieces) == byte.decode(ids)
    assert len("".join(pieces[: LONGEST_WINDOW + 10])) > LONGEST_WINDOW  # it does not wait for the end
    assert pieces[-2] == "" and pieces[-1].endswith(REPLACEMENT)


def test_the_cost_of_a_token_does_not_grow_with_the_answer(byte):
    class Counting:
        def __init__(self):
            self.longest = 0

        def decode(self, ids, *, skip_special_tokens):
            self.longest = max(self.longest, len(ids))
            return byte.decode(ids, skip_special_tokens=skip_special_tokens)

    counting = Counting()
    pieces_of(counting, encode_text(byte, "words " * 200).tolist())
    assert counting.longest <= 4


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abc", ["cde"], 1),
        ("abc", ["bcd", "cde"], 2),
        ("abc", ["abc"], 0),  # complete: the engine says so; nothing may be its start
        ("ab\n", ["\n\n"], 1),
        ("abc", ["x"], 0),
        ("abc", [], 0),
        ("", ["ab"], 0),
    ],
)
def test_what_may_start_a_stop_string_is_held_back(text, stops, expected):
    assert held_back(text, stops) == expected


def test_a_tokens_bytes_are_its_part_of_the_text(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(map(vocabulary.bytes, ids)).decode() == TEXT
    assert sum(map(vocabulary.length, ids)) == len(TEXT)
    assert vocabulary.is_special(tokenizer.eos_token_id) and not vocabulary.is_special(ids[0])
    assert vocabulary.special[tokenizer.eos_token] == tokenizer.eos_token_id


def test_half_a_character_is_named_by_its_bytes(byte):
    vocabulary = Vocabulary(byte)
    first, second = byte("ü", add_special_tokens=False)["input_ids"]
    assert (vocabulary.name(first), vocabulary.name(second)) == ("bytes:\\xc3", "bytes:\\xbc")
    assert vocabulary.text(first) == REPLACEMENT
    assert vocabulary.name(byte.eos_token_id) == "<|im_end|>"
