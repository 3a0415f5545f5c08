"""Tokenizers built from GGUF metadata and loaded from folders, against independent references."""

from __future__ import annotations

import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import regex
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import sentencepiece_model_pb2_new as model_pb2

from posttrain_jax.core.errors import InputError
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.gguf_file import GgufFile
from posttrain_jax.models.io.gguf_tokenizer import build_tokenizer
from posttrain_jax.models.io.tokenizer import end_of_turn_id, load_tokenizer, save_tokenizer, stop_token_ids

HERE = pathlib.Path(__file__).parent
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: pathlib.Path) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(smollm2_gguf)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def gemma(gemma_gguf: pathlib.Path) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(gemma_gguf)
    assert tokenizer is not None
    return tokenizer


def naive_bpe(text: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int]) -> Iterator[int]:
    """SmolLM2's tokenizer as llama.cpp states it: cut out every digit, then GPT-2's split, then merge by rank."""
    spelling = bytes_to_unicode()
    for stretch in regex.findall(r"\p{N}|[^\p{N}]+", text):
        for word in regex.findall(GPT2_SPLIT, stretch):
            parts = [spelling[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = list(itertools.pairwise(parts))
                best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                if best not in ranks:
                    break
                at = pairs.index(best)
                parts[at : at + 2] = ["".join(best)]
            for part in parts:
                yield vocab[part]


def test_smollm2_equals_a_plain_bpe(
    smollm2: PreTrainedTokenizerFast, smollm2_gguf: pathlib.Path, alpaca_path: pathlib.Path
) -> None:
    metadata = GgufFile(smollm2_gguf).metadata
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    texts = [row["output"] for row in json.loads(alpaca_path.read_text("utf-8"))[:150]]
    texts += [row["text"] for row in json.loads((HERE / "gemma_sentencepiece.json").read_text("utf-8"))]
    for text in texts:
        ids = smollm2.encode(text, add_special_tokens=False)
        assert ids == list(naive_bpe(text, vocab, ranks))
        assert smollm2.decode(ids) == text


def test_smollm2_trap_and_special_tokens(smollm2: PreTrainedTokenizerFast) -> None:
    """Two newlines before a digit are one token: the digit is split off before the GPT-2 pattern runs."""
    assert smollm2.convert_ids_to_tokens(smollm2.encode("\n\n1.")) == ["ĊĊ", "1", "."]
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id, smollm2.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    assert smollm2.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert smollm2.decode([1, 4093, 2], skip_special_tokens=True) == "user"
    assert "<|im_start|>" in str(smollm2.chat_template)
    assert len(smollm2) == 49152


def test_gemma_equals_sentencepiece(gemma: PreTrainedTokenizerFast) -> None:
    for row in json.loads((HERE / "gemma_sentencepiece.json").read_text("utf-8")):
        ids = gemma.encode(row["text"], add_special_tokens=False)
        assert ids == row["ids"], row["text"]
        assert gemma.decode(ids) == row["text"]


def test_gemma_special_tokens(gemma: PreTrainedTokenizerFast) -> None:
    assert (gemma.bos_token_id, gemma.eos_token_id, gemma.pad_token_id, gemma.unk_token_id) == (2, 1, 0, 3)
    assert gemma.encode("<start_of_turn>user\nhi<end_of_turn>\n") == [2, 105, 2364, 107, 2202, 106, 107]
    assert gemma.decode([2, 105, 2202, 106], skip_special_tokens=True) == "hi"
    assert gemma.decode([107, 138], skip_special_tokens=True) == "\n  "  # user-defined pieces are text
    assert gemma.chat_template is None
    assert len(gemma) == 262144


def test_gemma_round_trips_real_text(gemma: PreTrainedTokenizerFast, alpaca_path: pathlib.Path) -> None:
    for row in json.loads(alpaca_path.read_text("utf-8")):
        assert gemma.decode(gemma.encode(row["output"], add_special_tokens=False)) == row["output"]


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_saved_and_loaded_again(name: str, request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> None:
    tokenizer = request.getfixturevalue(name)
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again is not None
    assert again.chat_template == tokenizer.chat_template
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.model_max_length == tokenizer.model_max_length
    texts = [row["text"] for row in json.loads((HERE / "gemma_sentencepiece.json").read_text("utf-8"))]
    for text in [*texts, "<|im_end|><end_of_turn>\n\n1"]:
        assert again.encode(text) == tokenizer.encode(text)
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )


def byte_level_metadata(pre: str) -> dict:
    """All bytes, some merges, an end token: enough to see how text is split before BPE."""
    letters = list(bytes_to_unicode().values())
    merges = ["1 2", "12 3", "a b", "Ġ a", "Ċ Ċ", "' S", "e Ì", "ĉ ĉ", "Ġ Ġ", ". Ċ"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), "<|end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
    }


SPLIT_TEXTS = [
    "ab 123 1234 ab12\n\n12 ab's AB'S \t\tx",
    "e\u0301 é a  b.\n\n.\n  \n ab   ",
    "日本12語 ab<|end|>12",
]


def test_qwen2_split_equals_transformers() -> None:
    metadata = byte_level_metadata("qwen2")
    ours = build_tokenizer(metadata, "m.gguf")
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = Qwen2Tokenizer(
        vocab=vocab, merges=merges, unk_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    for text in SPLIT_TEXTS:
        assert ours.encode(text).ids == theirs.encode(text)


def test_llama3_splits_numbers_in_threes_and_starts_with_bos() -> None:
    """Llama 3: runs of one to three digits, contractions in any case, newlines with what comes before them."""
    ours = build_tokenizer(byte_level_metadata("llama-bpe"), "m.gguf")
    assert ours.encode("1234").tokens == ["<|end|>", "123", "4"]
    assert ours.encode("ab'S.\n").tokens == ["<|end|>", "ab", "'S", ".Ċ"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'"),
        ({"tokenizer.ggml.pre": "default"}, "is 'default'.*known: gpt-2, llama-bpe, qwen2, smollm"),
        ({"tokenizer.ggml.model": "bert"}, "is 'bert'"),
        ({"tokenizer.ggml.model": "llama"}, "lacks tokenizer.ggml.scores"),
    ],
)
def test_an_unknown_tokenizer_is_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_tokenizer({**byte_level_metadata("smollm"), **change}, "m.gguf")


def test_folders_without_and_with_damage(tmp_path: pathlib.Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    own_tokenizer(tmp_path, "PreTrainedTokenizerFast")
    for fields, message in (
        ([], "a JSON object was expected"),
        ({"model_max_length": "x"}, "model_max_length is 'x'"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path)


def test_a_damaged_cache_entry_is_made_again(
    smollm2_gguf: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    load_tokenizer(smollm2_gguf)
    (entry,) = (tmp_path / "tokenizers").iterdir()
    entry.write_text("{}")
    tokenizer = load_tokenizer(smollm2_gguf)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("again")) == "again"


def test_stop_tokens(smollm2: PreTrainedTokenizerFast, gemma: PreTrainedTokenizerFast) -> None:
    """EOS of the model, then of the tokenizer, then what the chat template ends a turn with."""
    config = ModelConfig("llama", 8, 4, 1, 1, 1, 4, 8, eos_token_ids=(7,))
    assert end_of_turn_id(smollm2) == 2
    assert end_of_turn_id(gemma) is None
    assert stop_token_ids(config, None) == (7,)
    assert stop_token_ids(config, smollm2) == (7, 2)
    turn = "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n"
    turns = "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
    chat = PreTrainedTokenizerFast(
        tokenizer_object=gemma.backend_tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    chat.chat_template = turns
    assert stop_token_ids(config, chat) == (7, 1, 106)
    chat.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn_id(chat) is None


def own_tokenizer(folder: pathlib.Path, name: str) -> Tokenizer:
    """A SentencePiece-like BPE in a tokenizer.json, in a folder that says another class."""
    text = ["def add(a, b): return a + b", "hello world this is a test of words"] * 3
    special = ["<unk>", "<s>", "</s>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": name, "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return tokenizer


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3_text", None])
def test_the_ids_are_those_of_tokenizer_json(family: str | None, name: str, tmp_path: pathlib.Path) -> None:
    """transformers 5 would build a Qwen2Tokenizer for every qwen2 folder, and loses all spaces of this one."""
    reference = own_tokenizer(tmp_path, name)
    if family is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    for text in ("hello world this is", "a</s>b", "x <|end|> hello\n\n", "café</s> words", "<s>hello"):
        assert (
            loaded.encode(text, add_special_tokens=False)
            == reference.encode(text, add_special_tokens=False).ids
        )
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")
    save_tokenizer(loaded, tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again is not None
    assert again.encode("x </s> hello world") == loaded.encode("x </s> hello world")


def test_a_config_that_changes_the_files_ids_is_not_followed(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = own_tokenizer(tmp_path, "PreTrainedTokenizerFast")
    path = tmp_path / "tokenizer_config.json"
    fields = {**json.loads(path.read_text()), "pad_token": "[PAD]"}
    stripped = {"content": "<|end|>", "lstrip": True, "rstrip": True, "special": True}
    for change in ({"split_special_tokens": True}, {"added_tokens_decoder": {"3": stripped}}):
        path.write_text(json.dumps({**fields, **change}))
        caplog.clear()
        loaded = load_tokenizer(tmp_path)
        assert loaded is not None
        text = "hello <|end|> world</s>"
        assert (
            loaded.encode(text, add_special_tokens=False)
            == reference.encode(text, add_special_tokens=False).ids
        )
        assert "than tokenizer.json does; taken is tokenizer.json" in caplog.text
        assert (loaded.eos_token_id, loaded.pad_token_id) == (2, reference.get_vocab_size())


def test_without_a_tokenizer_config_the_special_tokens_are_those_of_config_json(
    tmp_path: pathlib.Path,
) -> None:
    own_tokenizer(tmp_path, "")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "eos_token_id": [3, 2], "bos_token_id": 1})
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "<|end|>", None)


@pytest.fixture
def sentencepiece_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copy(HERE / "sentencepiece.model", tmp_path / "tokenizer.model")
    return tmp_path


def test_a_tokenizer_model_alone_gives_sentencepieces_ids(sentencepiece_folder: pathlib.Path) -> None:
    """After a special token a text is a text of its own, with a space in front; only `legacy: false` has it once."""
    loaded = load_tokenizer(sentencepiece_folder)
    assert loaded is not None
    rows = {row["text"]: row["ids"] for row in json.loads((HERE / "sentencepiece.json").read_text("utf-8"))}
    for text, ids in rows.items():
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.decode(ids) == text
    names = (loaded.bos_token, loaded.eos_token, loaded.unk_token, loaded.pad_token)
    assert names == ("<s>", "</s>", "<unk>", None)
    cat = "the cat sat on the mat and the hat"
    turn = loaded.convert_tokens_to_ids("<|end|>")
    assert loaded.encode(f"{cat}<|end|>{cat}") == [1, *rows[cat], turn, *rows[cat]]
    (sentencepiece_folder / "tokenizer_config.json").write_text(
        json.dumps({"legacy": False, "eos_token": "<|end|>"})
    )
    once = load_tokenizer(sentencepiece_folder)
    assert once is not None
    assert (once.eos_token, once.bos_token) == ("<|end|>", "<s>")
    assert once.encode(cat, add_special_tokens=False) == rows[cat]
    assert once.convert_ids_to_tokens(once.encode(f"{cat}<|end|>cat"))[-2] != "▁cat"
    assert loaded.convert_ids_to_tokens(loaded.encode(f"{cat}<|end|>cat"))[-1] == "▁cat"


def test_tokens_beside_those_of_a_tokenizer_model(sentencepiece_folder: pathlib.Path) -> None:
    """As the first fine-tunes had them: added_tokens.json names the tokens that follow, one of them the padding."""
    folder = sentencepiece_folder
    plain = load_tokenizer(folder)
    assert plain is not None
    first = len(plain)
    (folder / "added_tokens.json").write_text(
        json.dumps({"<|im_end|>": first + 1, "<pad>": first, "</s>": 2})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    loaded = load_tokenizer(folder)
    assert loaded is not None
    assert (loaded.pad_token_id, len(loaded)) == (first, first + 2)
    ids = loaded.encode("the cat<|im_end|>\n", add_special_tokens=False)
    assert ids == [*plain.encode("the cat", add_special_tokens=False), first + 1, *plain.encode("\n")[1:]]
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    bare = load_tokenizer(folder)
    assert bare is not None
    assert bare.encode("the cat<|im_end|>\n") == ids
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": first + 5}))
    with pytest.raises(
        InputError, match=r"added_tokens.json: the ids must go on after the \d+ of tokenizer.model"
    ):
        load_tokenizer(folder)


def test_what_is_no_plain_sentencepiece_bpe_is_refused_by_name(sentencepiece_folder: pathlib.Path) -> None:
    path = sentencepiece_folder / "tokenizer.model"
    whole = path.read_bytes()

    def changed(change: Callable[[Any], None]) -> bytes:
        proto = model_pb2.ModelProto()
        proto.ParseFromString(whole)
        change(proto)
        return proto.SerializeToString()

    for content, message in (
        (changed(lambda proto: setattr(proto.trainer_spec, "model_type", 1)), "its model_type is unigram"),
        (
            changed(lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True)),
            "it removes spaces",
        ),
        (
            changed(lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"x")),
            "it changes characters",
        ),
        (b"IQ== 0\nIg== 1\n", "not a SentencePiece model .Llama 3"),
        (b"", "not a SentencePiece model"),
        (whole[: len(whole) // 2], "not a SentencePiece model"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_tokenizer(sentencepiece_folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", 7, "tokenizer.ggml.model is 7"),
        ("tokens", ["a", 3], "tokenizer.ggml.tokens is not a list of what belongs there"),
        ("tokens", "abc", "tokenizer.ggml.tokens is not a list"),
        ("token_type", [1], "token_type has 1 entries for"),
        ("merges", ["ab"], "the merge 'ab' makes no token of two tokens"),
        ("bos_token_id", 10**6, "bos_token_id is 1000000, beyond the vocabulary"),
        ("eos_token_id", "2", "eos_token_id is '2', beyond the vocabulary"),
    ],
)
def test_a_vocabulary_of_no_sense_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_tokenizer({**byte_level_metadata("smollm"), f"tokenizer.ggml.{key}": value}, "m.gguf")
