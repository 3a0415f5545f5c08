"""Writes sentencepiece.model, a small BPE trained by SentencePiece itself, and what it makes of some texts.

pip install sentencepiece==0.2.3 && python tests/models/io/make_sentencepiece.py
"""

from __future__ import annotations

import json
import pathlib

import sentencepiece

HERE = pathlib.Path(__file__).parent
TEXTS = [
    "Hello world, this is  a   test.",
    " a space in front and one behind ",
    "line\nnext\n\n  indented\ttab",
    "café 日本語 😀 12 345",
    "the cat sat on the mat and the hat",
    "",
]
SENTENCES = [
    "the cat sat on the mat",
    "hello world this is a test of a small tokenizer",
    "one two three 12 345",
] * 20

if __name__ == "__main__":
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(HERE / "sentencepiece"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["[INST]"],
        control_symbols=["<|end|>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (HERE / "sentencepiece.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "sentencepiece.model"))
    rows = [{"text": text, "ids": model.encode(text)} for text in TEXTS]
    (HERE / "sentencepiece.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", "utf-8")
