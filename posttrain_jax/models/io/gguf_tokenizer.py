"""Builds a tokenizer from a GGUF file's metadata, for `tokenizers`.

Two kinds of vocabulary exist. "gpt2": byte-level BPE with its merges; how text is split before BPE is named by
`tokenizer.ggml.pre` (llama.cpp, src/llama-vocab.cpp), and an unknown name is refused, because a wrong split is
silently wrong. "llama": SentencePiece BPE (arXiv:1808.06226), pieces with scores and no merges.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from posttrain_jax.core.errors import InputError, shown

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = f"{_CONTRACTIONS}|{_WORDS_AND_SPACES % '{1,3}'}"
_QWEN2 = f"{_CONTRACTIONS}|{_WORDS_AND_SPACES % ''}"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level])


def _pre_tokenizer(pre: str, where: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    match pre:
        case "gpt-2":
            return gpt2
        case "smollm":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
        case "llama-bpe":
            return _split(_LLAMA3)
        case "qwen2":
            return _split(_QWEN2)
    raise InputError(
        f"{where}: tokenizer.ggml.pre is {pre!r}, and how it splits text is not known here (known: gpt-2, llama-bpe, "
        "qwen2, smollm); use the model's Hugging Face folder instead."
    )


def build_tokenizer(metadata: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes, special tokens and BOS included.

    Args:
      metadata: as `GgufFile.metadata`.
      where: the file's name, for errors.

    Raises:
      InputError: an unknown kind of vocabulary or pre-tokenizer.
    """
    kind = metadata["tokenizer.ggml.model"]
    if not isinstance(kind, str):
        raise InputError(f"{where}: tokenizer.ggml.model is {shown(kind)}, but must be a name.")
    for key in ("tokens", "token_type", {"gpt2": "merges", "llama": "scores"}.get(kind, "tokens")):
        if f"tokenizer.ggml.{key}" not in metadata:
            raise InputError(f"{where}: the metadata lacks tokenizer.ggml.{key}; convert the model again.")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    _check_lists(metadata, where)
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, where)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, types)
    else:
        raise InputError(
            f"{where}: tokenizer.ggml.model is {kind!r} but only gpt2 and llama are known; "
            "use the model's Hugging Face folder instead."
        )
    for special, kind_number in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == kind_number
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    if tokenizer.get_vocab_size() != len(tokens):
        raise InputError(
            f"{where}: the vocabulary has {len(tokens)} entries but only {tokenizer.get_vocab_size()} different ones."
        )
    if adds_bos(metadata):
        bos = tokens[metadata["tokenizer.ggml.bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])],
        )
    return tokenizer


def _check_lists(metadata: dict[str, Any], where: str) -> None:
    """Refuses lists of other things, or of another length, than a vocabulary."""
    tokens = metadata["tokenizer.ggml.tokens"]
    for key, kind in (("tokens", str), ("merges", str), ("token_type", int), ("scores", int | float)):
        values = metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise InputError(
                f"{where}: tokenizer.ggml.{key} is not a list of what belongs there; convert again."
            )
        if key in ("token_type", "scores") and values and len(values) != len(tokens):
            raise InputError(
                f"{where}: tokenizer.ggml.{key} has {len(values)} entries for {len(tokens)} tokens; convert again."
            )
    known = set(tokens)
    for merge in metadata.get("tokenizer.ggml.merges", []):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise InputError(
                f"{where}: the merge {shown(merge)} makes no token of two tokens; convert again."
            )
    for name in ("bos", "eos", "unknown", "padding"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id", 0)
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise InputError(
                f"{where}: tokenizer.ggml.{name}_token_id is {shown(index)}, beyond the vocabulary."
            )
    if adds_bos(metadata) and "tokenizer.ggml.bos_token_id" not in metadata:
        raise InputError(f"{where}: BOS is to be added, but the metadata lacks tokenizer.ggml.bos_token_id.")


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether encoding puts BOS first: as in the file, else llama.cpp's default for the vocabulary."""
    default = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(metadata: dict[str, Any], tokens: list[str], where: str) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, where)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece BPE: of all neighbors whose concatenation is a piece, the best-scored is merged first.

    User-defined pieces (runs of newlines, of spaces ...) are cut out of the text first and never merged; they
    become added tokens. Characters without a piece become bytes. Where the file asks for a space in front, every
    stretch of text gets one, also after a special token (as in llama.cpp).
    """
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(tokens, types, metadata["tokenizer.ggml.scores"]),
            unk_token=tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    escape = normalizers.Replace(" ", "▁")
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    if prefix and metadata.get(
        "tokenizer.ggml.prefix_first"
    ):  # of a tokenizer.model, see sentencepiece_model.py
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape]) if prefix else escape
    if prefix:
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, in the order in which SentencePiece would take them."""
    normal = {
        token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL
    }
    best_first = sorted(normal.values(), key=lambda index: -scores[index])
    out: list[tuple[str, str]] = []
    for index in best_first:
        piece = tokens[index]
        pairs = [
            (normal[piece[:cut]], normal[piece[cut:]])
            for cut in range(1, len(piece))
            if piece[:cut] in normal and piece[cut:] in normal
        ]
        out.extend((tokens[left], tokens[right]) for left, right in sorted(pairs))
    return out
