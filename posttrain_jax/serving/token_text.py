"""Tokens to text as clients read it: a completion as it grows, and each token by itself."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from posttrain_jax.sampling.prompts import REPLACEMENT, special_tokens

LONGEST_PART = 3
"""A UTF-8 character has at most 4 bytes, so what is missing its end shows as at most 3 replacement characters."""
LONGEST_WINDOW = 64

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """The text of a growing sequence of tokens; a character is held back until it is complete.

    Only the tokens since the last complete character, and those of the one before it, are decoded again (decoders treat
    the start of a text in a way of their own), so the cost of a token does not grow with the completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._read = 0
        self._given = 0

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        part = len(text) - len(text.rstrip(REPLACEMENT))
        complete = len(text) - min(part, LONGEST_PART)
        new = text[self._given : complete]
        self._given = max(self._given, complete)
        if (new and not part) or len(self._ids) - self._read >= LONGEST_WINDOW:
            rest = text[self._given :]
            new += rest
            self._start, self._read = self._read, len(self._ids)
            self._given = len(self._decode(self._ids[self._start :]))
        return new

    def rest(self) -> str:
        """What was held back: the end of a text that ends within a character."""
        return self._decode(self._ids[self._start :])[self._given :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def held_back(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of the text may be the start of a stop string."""
    longest = max((len(stop) for stop in stop_strings), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stop_strings):
            return size
    return 0


class Vocabulary:
    """Each token's own text and bytes, as log-probabilities name them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.special = special_tokens(tokenizer)
        self._special_ids = {*self.special.values(), *tokenizer.all_special_ids}
        # Decoders strip the space before a text's first word, so each token is decoded after another one.
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._anchor_length = len(tokenizer.decode(self._anchor))
        self.text = functools.lru_cache(maxsize=None)(self._text)
        self.bytes = functools.lru_cache(maxsize=None)(self._bytes)
        self.name = functools.lru_cache(maxsize=None)(self._name)

    def is_special(self, token: int) -> bool:
        """Whether the token is left out of a completion's text."""
        return token in self._special_ids

    def length(self, token: int) -> int:
        """Characters that begin in this token; those of a text's tokens add up to its length."""
        return sum(byte & 0xC0 != 0x80 for byte in self.bytes(token))

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([*self._anchor, token]))[self._anchor_length :]

    def _bytes(self, token: int) -> bytes:
        text = self.text(token)
        if REPLACEMENT not in text:
            return text.encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        return text.encode()

    def _name(self, token: int) -> str:
        """The token's text; where it is no complete character, its bytes as OpenAI writes them: `bytes:\\xe2\\x96`."""
        text = self.text(token)
        if REPLACEMENT not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token))


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: printable Latin-1 bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
