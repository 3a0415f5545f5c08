"""A folder's tokenizer.model (SentencePiece, arXiv:1808.06226) as the metadata that `gguf_tokenizer` builds from."""

from __future__ import annotations

import pathlib
from typing import Any

from google.protobuf.message import DecodeError
from transformers.utils import sentencepiece_model_pb2_new as model_pb2

from posttrain_jax.core.errors import InputError

_BPE = 2
_USER_DEFINED = model_pb2.ModelProto.SentencePiece.USER_DEFINED


def metadata_of(path: pathlib.Path, *, legacy: bool, added: dict[str, Any] | None = None) -> dict[str, Any]:
    """The contents of a tokenizer.model, under GGUF's names.

    Args:
      legacy: the text after a special token gets a space in front too, as SentencePiece gives it to every piece of
        text (transformers' `legacy`, the default of its version 4); otherwise only the whole text does.
      added: tokens beside the file's with their ids (added_tokens.json).

    Raises:
      InputError: another kind of file, or a SentencePiece model that is no plain BPE.
    """
    proto = model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise InputError(_no_model(path)) from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if not proto.pieces:
        raise InputError(_no_model(path))
    for wrong, what in (
        (trainer.model_type != _BPE, f"its model_type is {_kind(trainer.model_type)}"),
        (bool(normalizer.precompiled_charsmap), f"it changes characters ({normalizer.name})"),
        (normalizer.remove_extra_whitespaces, "it removes spaces"),
        (not normalizer.escape_whitespaces, "it does not escape spaces"),
        (trainer.treat_whitespace_as_suffix, "it puts spaces at the end of words"),
    ):
        if wrong:
            raise InputError(
                f"{path}: only SentencePiece's plain BPE is read, but {what}; make a tokenizer.json with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
    extra = sorted((added or {}).items(), key=lambda item: str(item[1]).zfill(12))
    extra = [(token, index) for token, index in extra if index not in _places(proto, token)]
    if [index for _, index in extra] != list(range(len(proto.pieces), len(proto.pieces) + len(extra))):
        raise InputError(
            f"{path.with_name('added_tokens.json')}: the ids must go on after the {len(proto.pieces)} of "
            f"{path.name}, without a gap; correct the file."
        )
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unknown": trainer.unk_id, "padding": trainer.pad_id}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*(piece.piece for piece in proto.pieces), *(token for token, _ in extra)],
        "tokenizer.ggml.scores": [*(piece.score for piece in proto.pieces), *(0.0 for _ in extra)],
        "tokenizer.ggml.token_type": [
            *(piece.type for piece in proto.pieces),
            *(_USER_DEFINED for _ in extra),
        ],
        "tokenizer.ggml.add_space_prefix": normalizer.add_dummy_prefix,
        "tokenizer.ggml.add_bos_token": trainer.bos_id >= 0,
        "tokenizer.ggml.prefix_first": not legacy,
        **{f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index >= 0},
    }


def _places(proto: Any, token: str) -> list[int]:
    """Where the file has a token already (added_tokens.json may name it again)."""
    return [index for index, piece in enumerate(proto.pieces) if piece.piece == token]


def _kind(number: int) -> str:
    return model_pb2.TrainerSpec.ModelType.Name(number).lower()


def _no_model(path: pathlib.Path) -> str:
    return (
        f"{path}: not a SentencePiece model (Llama 3's own tokenizer.model is tiktoken's, for one); put the model's "
        "tokenizer.json beside it."
    )
