"""Makes gemma_sentencepiece.json: what Google's sentencepiece (0.2.3) makes of the texts with Gemma 3's vocabulary.

    python -m pip install sentencepiece==0.2.3 protobuf
    python tests/models/io/make_gemma_sentencepiece.py

The pieces, scores and types come from the GGUF file; sentencepiece does the rest.
"""

from __future__ import annotations

import json
import pathlib

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from posttrain_jax.demo import assets
from posttrain_jax.models.io.gguf_file import GgufFile

TEXTS = [
    "",
    " ",
    "a",
    " leading and trailing ",
    "Hello, world! The capital of France is Paris.",
    "two  spaces, three   spaces, eight        spaces",
    " " * 70,
    "\n" * 40,
    "\t\tif x:\r\n\t\t\treturn None\r\n",
    "1. First\n\n2. Second\n\n\n3. Third 1234567890 3.14159",
    "def f(x: int) -> str:\n    '''Doc.'''\n    return f\"{x:>10}\"  # comment\n",
    "<table><tr><td>cell</td></tr></table><h1>Title</h1>",
    "naïve café, Ünïcödé, ß, é as e\u0301, ﬁ ligature",
    "日本語のテスト。한국어 시험, 中文测试，标点符号！",
    "العربية والفارسية हिन्दी ไทย עברית ελληνικά Русский язык",
    "emoji 🦄👩\u200d👩\u200d👧\u200d👦🏽 flags 🇫🇷 and symbols ∑∫√≠≤ 𝔹𝕆𝕃𝔻 𓂀 ꧁",
    "zero\u200bwidth, nul \x00, bell \x07, bom \ufeff, private \ue000",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ababababababab",
    "https://example.com/a?b=c&d=%20e#f user@example.org C:\\path\\to",
    "don't can't I'm you'll WE'VE it's 'quoted' \"double\"",
    "antidisestablishmentarianism supercalifragilisticexpialidocious Donaudampfschifffahrt",
    "$E = mc^2$, \\frac{1}{2}, x_i^{2}, \\sum_{i=0}^{n} i",
    '{"key": [1, 2, {"nested": null}], "other": "value"}',
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
]


def main() -> None:
    metadata = GgufFile(assets.fetch("gemma-3-270m")).metadata
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    ids = ("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)
    for name, index in ids:
        setattr(model.trainer_spec, f"{name}_id", index)
    model.trainer_spec.unk_piece = "<unk>"
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    columns = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    for piece, score, kind in zip(*columns, strict=True):
        if kind == 4:  # llama.cpp's converter writes the spaces of user-defined pieces plainly
            piece = piece.replace(" ", "▁")
        model.pieces.add(piece=piece, score=score, type=2 if piece == "<unk>" else kind)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    rows = [{"text": text, "ids": processor.encode(text)} for text in TEXTS]
    lines = ",\n".join(json.dumps(row) for row in rows)
    pathlib.Path(__file__).with_name("gemma_sentencepiece.json").write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    main()
