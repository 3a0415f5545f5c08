"""Loads and saves tokenizers, always as `transformers`' fast tokenizer with the chat template in place."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain_jax.core.cache import cache_root
from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.data.chat_template import Template, resolve_template
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.gguf_file import GgufFile
from posttrain_jax.models.io.gguf_tokenizer import adds_bos, build_tokenizer
from posttrain_jax.models.io.hf_config import read_json, text_config
from posttrain_jax.models.io.sentencepiece_model import metadata_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""The files of a Hugging Face folder that a tokenizer is made of; no code, no pickles."""

_PROBES = (
    "Hello world, this is  a   test.",
    " a space in front and one behind ",
    "line\nnext\n\n  indented\ttab\r\n\n\n1. item",
    "It's we'LL 12 345 1234567 3.14 -1e5 \u0664\u0662",
    "caf\u00e9 cafe\u0301 na\u00efve \ufb01 \u212b \u00bd \u2212",
    "\u65e5\u672c\u8a9e\u3068\u4e2d\u6587 \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f468\u200d\U0001f469 \u2028 \u00a0 \x00",
    "def f(x):\n    return x**2  # <b>&amp;</b> http://a.b/c?d=e_f",
)
"""Texts that show how a tokenizer treats spaces, lines, digits, composed characters, scripts and code."""

_CACHE_FORMAT = 1
"""Part of the cache key: raise it when `gguf_tokenizer` builds something else from the same metadata."""


def load_tokenizer(
    path: str | pathlib.Path, *, gguf: GgufFile | None = None
) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a Hugging Face folder or a `.gguf` file; None where a folder has none.

    Args:
      gguf: the same file, already open (its metadata need not be read twice).

    Raises:
      InputError: the tokenizer's files are damaged, need remote code, or hold an unknown kind of tokenizer.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return _from_gguf(gguf or GgufFile(path))
    if (path / "tokenizer.json").is_file():
        return _from_json(path, path / "tokenizer.json", _ids_of_config(path))
    if (path / "tokenizer.model").is_file():
        return _from_sentencepiece(path)
    if not (path / "vocab.json").is_file():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for damaged files
        raise InputError(f"{path}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"{path}: the tokenizer has no fast version (tokenizer.json); convert it with transformers."
        )
    return tokenizer


def _from_json(
    folder: pathlib.Path, file: pathlib.Path, named: dict[str, int] | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a tokenizer.json, with the special tokens and the template that the folder names.

    The ids are the file's, whatever class the folder names: transformers 5 would build a Qwen2Tokenizer or a
    LlamaTokenizer anew from the vocabulary, and split text as most models of that class do.

    Args:
      named: ids of special tokens ("bos", "eos", "unk", "pad") for those that the folder does not name.
    """
    described = [
        _json_if_there(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")
    ]
    length = described[0].get("model_max_length", 0)
    if isinstance(length, bool) or not isinstance(length, int | float | None):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {shown(length)}, but must be a number."
        )
    try:
        reference = Tokenizer.from_file(str(file))
        special = {
            f"{name}_token": reference.id_to_token(index)
            for name, index in (named or {}).items()
            if not any(f"{name}_token" in fields for fields in described) and 0 <= index < 2**31
        }
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(folder), tokenizer_file=str(file), trust_remote_code=False, local_files_only=True, **special
        )
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for damaged files
        raise InputError(f"{folder}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    changed = changed_text(reference, tokenizer)
    if changed is None:
        return tokenizer
    followed = _on(reference, tokenizer)
    if changed_text(reference, followed) is not None:
        raise InputError(
            f"{folder}: tokenizer_config.json and tokenizer.json do not agree: with the first, {changed!r} becomes "
            "other tokens; correct it (added_tokens_decoder) or take it away."
        )
    if file.parent == folder:
        logging.getLogger(__name__).warning(
            "%s: tokenizer_config.json makes other tokens of %r than tokenizer.json does; taken is tokenizer.json.",
            folder,
            changed,
        )
    return followed


def _on(backend: Tokenizer, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer's special tokens, further tokens and template on another backend."""
    backend = copy.deepcopy(backend)
    backend.post_processor = (
        tokenizer.backend_tokenizer.post_processor
    )  # the config decides whether BOS is added
    backend.add_tokens(
        [
            AddedToken(token.content, normalized=False, special=token.special)
            for index, token in sorted(tokenizer.added_tokens_decoder.items())
            if index >= backend.get_vocab_size()
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        chat_template=tokenizer.chat_template,
    )


def _json_if_there(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _ids_of_config(folder: pathlib.Path) -> dict[str, int]:
    """The special tokens that config.json gives, for a folder in which nothing names any."""
    if (folder / "tokenizer_config.json").is_file():
        return {}
    fields = text_config(_json_if_there(folder / "config.json"))
    ids = {name: fields.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    first = {name: index[0] if isinstance(index, list) and index else index for name, index in ids.items()}
    return {name: index for name, index in first.items() if isinstance(index, int)}


def changed_text(reference: Tokenizer, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """A text to which a tokenizer gives other ids than the file that it was made of; None where there is none.

    It tries texts that show how a tokenizer splits, alone and around the file's special and added tokens. Tokens that
    the folder adds to those of the file are left out.
    """
    added = list(reference.get_added_tokens_decoder().values())
    some = [token.content for token in [*added[:24], *added[24:][-24:]]]
    texts = [*_PROBES, *(f"{text}{token}{text}" for token in some for text in ("", "word", " two words\n"))]
    theirs = reference.encode_batch_fast(texts, add_special_tokens=False)
    ours = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    changed = [text for text, a, b in zip(texts, theirs, ours, strict=True) if a.ids != b.ids]
    return changed[0] if changed else None


def _from_sentencepiece(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """A folder that has a tokenizer.model alone, as the first Llama and Mistral folders."""
    legacy = _json_if_there(folder / "tokenizer_config.json").get("legacy") is not False
    added = _json_if_there(folder / "added_tokens.json")
    metadata = metadata_of(folder / "tokenizer.model", legacy=legacy, added=added)
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in ids.items()}
    named = {name: metadata[key] for name, key in keys.items() if key in metadata}
    return _of_metadata(
        metadata, str(folder / "tokenizer.model"), lambda file: _from_json(folder, file, named)
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template.

    `PreTrainedTokenizerFast` is named as the class, so that every version of transformers reads tokenizer.json as
    it is, instead of rebuilding it with a family's own class.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text("utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("auto_map", "name_or_path", "is_local", "local_files_only"):
        config.pop(key, None)
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def stop_token_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerFast | None) -> tuple[int, ...]:
    """The ids that end a generation: the model's EOS, the tokenizer's, and the one that ends an assistant turn."""
    ids = list(config.eos_token_ids)
    if tokenizer is not None:
        ids += [index for index in (tokenizer.eos_token_id, end_of_turn_id(tokenizer)) if index is not None]
    return tuple(dict.fromkeys(ids))


def scoring_pad_id(config: ModelConfig, tokenizer: PreTrainedTokenizerFast | None) -> int:
    """The padding id of a reward model's Hugging Face folder.

    transformers reads a score at a row's last token that is not padding, so the token that ends a completion must not
    be the padding too (as it is in SmolLM2). The tokenizer's own, or the config's, or else the special token that is
    least likely to end anything: one named "pad", the unknown token, one that no generation stops at.

    Raises:
      InputError: there is none.
    """
    ends = set(config.eos_token_ids)
    candidates = [config.pad_token_id]
    if tokenizer is not None:
        own_ends = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)} - {None}
        special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        order = sorted(
            special,
            key=lambda i: ("pad" not in special[i].lower(), i != tokenizer.unk_token_id, i in ends, i),
        )
        candidates = [tokenizer.pad_token_id, config.pad_token_id]
        candidates += [index for index in order if index != tokenizer.bos_token_id]
        ends = own_ends or ends
    for index in candidates:
        if index is not None and index not in ends:
            return index
    raise InputError(
        "The reward model has no padding token other than the one that ends a text, so transformers could not find "
        "where a text ends; add a special token to its tokenizer and make it the pad_token."
    )


def end_of_turn_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token that the chat template writes after an assistant turn; None where there is none."""
    if not tokenizer.chat_template:
        return None
    answer = "posttrain"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = Template(resolve_template(tokenizer), tokenizer).render(chat).text
    except InputError:  # the template refuses this conversation
        return None
    tail = tokenizer(
        text[text.rindex(answer) + len(answer) :] if answer in text else "", add_special_tokens=False
    )
    special = set(tokenizer.all_special_ids) | {
        i for i, t in tokenizer.added_tokens_decoder.items() if t.special
    }
    return next((index for index in tail["input_ids"] if index in special), None)


def _from_gguf(file: GgufFile) -> PreTrainedTokenizerFast:
    metadata, where = file.metadata, str(file.path)
    if "tokenizer.ggml.model" not in metadata:
        raise InputError(
            f"{where}: the file holds no tokenizer; use the model's Hugging Face folder instead."
        )
    tokens = metadata.get("tokenizer.ggml.tokens", [])

    def token(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index >= len(tokens):
            raise InputError(f"{where}: tokenizer.ggml.{key}_token_id is {index}, beyond the vocabulary.")
        return None if index is None else tokens[index]

    def tokenizer_of(json_path: pathlib.Path) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_file=str(json_path),
            bos_token=token("bos"),
            eos_token=token("eos"),
            unk_token=token("unknown"),
            pad_token=token("padding"),
            add_bos_token=adds_bos(metadata),
            add_eos_token=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
            clean_up_tokenization_spaces=False,
            model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length"),
        )

    tokenizer = _of_metadata(metadata, where, tokenizer_of)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _of_metadata(
    metadata: dict[str, Any], where: str, load: Callable[[pathlib.Path], PreTrainedTokenizerFast]
) -> PreTrainedTokenizerFast:
    """What `load` makes of the tokenizer.json that `build_tokenizer` makes of the metadata; that file is cached."""
    cached = _cache_path(metadata)
    if cached.is_file():
        try:
            return load(cached)
        except Exception:  # tokenizers raises bare Exceptions for a damaged file
            logging.getLogger(__name__).warning("%s is damaged; building the tokenizer again.", cached)
    _build_into(cached, metadata, where)
    return load(cached)


def _cache_path(metadata: dict[str, Any]) -> pathlib.Path:
    """The path of the built tokenizer.json, keyed by everything that it is built from."""
    parts = {key: value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}
    digest = hashlib.sha256(json.dumps([_CACHE_FORMAT, parts], sort_keys=True).encode()).hexdigest()
    return cache_root() / "tokenizers" / f"{digest[:32]}.json"


def _build_into(path: pathlib.Path, metadata: dict[str, Any], where: str) -> None:
    tokenizer = build_tokenizer(metadata, where)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(tokenizer.to_str())
        os.replace(file.name, path)
    except OSError as error:
        raise InputError(
            f"cannot write the tokenizer into the cache folder {path.parent} ({error.strerror or error}); "
            "free some space or set POSTTRAIN_CACHE to another folder."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
