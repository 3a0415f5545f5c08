"""Reward models give the scores of `transformers`' sequence classification: in, out, and from a run's workdir."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForSequenceClassification,
)

from launch.export import export
from parity.torch_families import FAMILIES, make_config, randomize
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import PyTree, TrainState
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.export import export_hf, write_model_folder
from posttrain_jax.models.io.load import LoadedModel, load_model, require_score_head
from posttrain_jax.models.reward_head import score_head_params, scores
from posttrain_jax.models.transformer import Model, make_model
from posttrain_jax.run.checkpoint import Checkpoints

LENGTHS = (24, 9, 17, 1)


def padded_rows(vocab: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) of rows of LENGTHS, padded on the right."""
    mask_BT = (np.arange(max(LENGTHS))[None] < np.asarray(LENGTHS)[:, None]).astype(np.int32)
    tokens_BT = np.random.default_rng(0).integers(3, vocab, mask_BT.shape).astype(np.int32)
    return np.where(mask_BT == 1, tokens_BT, pad).astype(np.int32), mask_BT


def our_scores(model: Model, params: PyTree, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    def of(params: PyTree) -> jax.Array:
        output = model.apply(
            params, jnp.asarray(tokens_BT), segment_ids_BT=jnp.asarray(mask_BT), logits=False
        )
        ends_BN = jnp.asarray(mask_BT.sum(axis=1, keepdims=True) - 1)
        return scores(params["score_head"], output.hidden_BTD, ends_BN)[:, 0]

    return np.asarray(jax.jit(of)(params))


def their_scores(model: torch.nn.Module, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = model(torch.tensor(tokens_BT), attention_mask=torch.tensor(mask_BT)).logits
    assert found.shape == (len(tokens_BT), 1)
    return found[:, 0].numpy()


def assert_close(ours: np.ndarray, reference: np.ndarray) -> None:
    """1e-4 relative to the largest score."""
    assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()
    assert np.ptp(reference) > 0.1 * np.abs(reference).max(), "all rows score alike, so nothing is shown"


def reread(folder: pathlib.Path) -> torch.nn.Module:
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert model.config.num_labels == 1
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_in_and_out(name: str, tmp_path: pathlib.Path) -> None:
    config = make_config(name)
    config.num_labels = 1
    theirs = AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    randomize(theirs, seed=0)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    tokens_BT, mask_BT = padded_rows(96, pad=0)
    reference = their_scores(theirs, tokens_BT, mask_BT)
    ours = load_model(str(tmp_path / "theirs"))
    assert_close(our_scores(ours.model, ours.params, tokens_BT, mask_BT), reference)
    for original in (ours.original, None):
        folder = tmp_path / ("fresh" if original is None else "kept")
        export_hf(
            folder,
            config=ours.config,
            params=ours.params,
            tokenizer=None,
            original=original,
            max_shard_bytes=40_000,
        )
        exported = reread(folder)
        assert type(exported) is type(theirs)
        np.testing.assert_array_equal(their_scores(exported, tokens_BT, mask_BT), reference)


def test_gain_and_bias(tmp_path: pathlib.Path) -> None:
    """The gain is in the weights; the bias is what transformers lacks, and it finds it in its config."""
    config, params = tiny_reward_model(LoraConfig())
    head = {**params["score_head"], "gain": jnp.float32(3.0), "bias": jnp.float32(-0.625)}
    params = {**params, "score_head": head}
    tokens_BT, mask_BT = padded_rows(256, pad=256)
    expected = our_scores(make_model(config), params, tokens_BT, mask_BT)
    export_hf(tmp_path / "m", config=config, params=params, tokenizer=byte_tokenizer())
    theirs = reread(tmp_path / "m")
    assert theirs.config.score_bias == -0.625
    assert_close(their_scores(theirs, tokens_BT, mask_BT) + theirs.config.score_bias, expected)


def test_texts_that_end_in_the_end_of_turn(tmp_path: pathlib.Path) -> None:
    """A tokenizer that pads with its EOS would make transformers read the score one token too early."""
    config, params = tiny_reward_model(LoraConfig())
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    export_hf(tmp_path / "m", config=config, params=params, tokenizer=tokenizer)
    theirs = reread(tmp_path / "m")
    batch = AutoTokenizer.from_pretrained(tmp_path / "m")(
        ["good<|im_end|>", "a longer one<|im_end|>"], padding=True, padding_side="right", return_tensors="np"
    )
    tokens_BT = batch["input_ids"].astype(np.int32)
    mask_BT = batch["attention_mask"].astype(np.int32)
    assert tokens_BT[0, mask_BT[0].sum() - 1] == tokenizer.eos_token_id
    expected = our_scores(make_model(config), params, tokens_BT, mask_BT)
    assert_close(their_scores(theirs, tokens_BT, mask_BT), expected)


def test_as_a_user_of_transformers_writes_it(tmp_path: pathlib.Path) -> None:
    """apply_chat_template on a batch, with padding on either side: our scores, and so our ranking.

    The byte tokenizer's template ends in a newline after the end of the turn; the score is read before it.
    """
    config, params = tiny_reward_model(LoraConfig())
    params["score_head"]["bias"] = jnp.float32(0.5)
    tokenizer = byte_tokenizer()
    export_hf(tmp_path / "m", config=config, params=params, tokenizer=tokenizer)
    theirs, answers = reread(tmp_path / "m"), ["good", "a much longer one", "no", "4"]
    question = [{"role": "user", "content": "2 + 2?"}]
    chats = [[*question, {"role": "assistant", "content": answer}] for answer in answers]
    rows = [tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n") for chat in chats]
    ids = [tokenizer.encode(row) for row in rows]
    mask_BT = np.array([[n < len(row) for n in range(64)] for row in ids], np.int32)
    tokens_BT = np.array([row + [0] * (64 - len(row)) for row in ids], np.int32)
    expected = our_scores(make_model(config), params, tokens_BT, mask_BT)
    for side in ("right", "left"):
        user = AutoTokenizer.from_pretrained(tmp_path / "m", padding_side=side)
        batch = user.apply_chat_template(
            chats, tokenize=True, padding=True, return_tensors="pt", return_dict=True
        )
        assert batch["input_ids"].shape[1] == max(map(len, ids))
        with torch.no_grad():
            found = theirs(**batch).logits[:, 0].numpy() + theirs.config.score_bias
        assert_close(found, expected)
        assert list(np.argsort(found)) == list(np.argsort(expected))
    prompt = user.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt == tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert load_model(str(tmp_path / "m")).tokenizer.chat_template == user.chat_template


def tiny_reward_model(lora: LoraConfig) -> tuple[ModelConfig, PyTree]:
    config = ModelConfig(
        "qwen3", 260, 32, 2, 4, 2, 8, 64, query_scale=8**-0.5, qk_norm=True, tied_embeddings=False
    )
    params = jax.tree.map(lambda leaf: 5 * leaf, make_model(config, lora=lora).init(jax.random.key(0)))
    return config, {**params, "score_head": score_head_params(jax.random.key(1), 32, init="normal")}


@pytest.mark.parametrize("keeps_the_head", [True, False])
@pytest.mark.parametrize("rank", [0, 2])
def test_from_a_workdir(keeps_the_head: bool, rank: int, tmp_path: pathlib.Path) -> None:
    """A run as reward training leaves it (with LoRA: adapters and head trained, the rest frozen), exported.

    The vocabulary projection of the model that it began with may have stayed in the checkpoint or not.
    """
    lora = LoraConfig(rank=rank, alpha=4.0, targets=("q", "v"))
    config, params = tiny_reward_model(lora)
    if rank:
        b = params["layers"]["attn"]["q"]["lora_b"]
        params["layers"]["attn"]["q"]["lora_b"] = jax.random.normal(jax.random.key(2), b.shape)
    if not keeps_the_head:
        del params["head"]
    workdir = tmp_path / "run"
    save_run(workdir, config, params, lora)
    loaded = load_model(str(workdir))
    expected_tree = {name: part for name, part in params.items() if name != "head"}
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected_tree)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected_tree)
    tokens_BT, mask_BT = padded_rows(256, pad=256)
    expected = our_scores(make_model(config, lora=lora), params, tokens_BT, mask_BT)
    assert_close(our_scores(loaded.model, loaded.params, tokens_BT, mask_BT), expected)
    assert export(str(workdir), tmp_path / "out") == 1
    theirs = reread(tmp_path / "out")
    assert_close(their_scores(theirs, tokens_BT, mask_BT) + theirs.config.score_bias, expected)
    again: LoadedModel = load_model(str(tmp_path / "out"))
    require_score_head(again)
    assert_close(our_scores(again.model, again.params, tokens_BT, mask_BT), expected)
    if rank:
        with pytest.raises(InputError, match="score head is no part of an adapter"):
            export(str(workdir), tmp_path / "adapter", adapter_only=True)
    fields = json.loads((workdir / "model" / "config.json").read_text())
    fields["architectures"] = ["Qwen3ForCausalLM"]
    (workdir / "model" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="hold a score head but .* language model"):
        load_model(str(workdir))


def save_run(workdir: pathlib.Path, config: ModelConfig, params: PyTree, lora: LoraConfig) -> None:
    params["score_head"] |= {"gain": jnp.float32(2.0), "bias": jnp.float32(0.25)}
    write_model_folder(workdir / "model", config=config, tokenizer=byte_tokenizer(), reward=True)
    fields = {**dataclasses.asdict(lora), "targets": list(lora.targets)}
    (workdir / "config.json").write_text(json.dumps({"model": {"lora": fields}}))
    trained, frozen = partition(
        params, lambda path: not lora.rank or "lora" in path or path.endswith("score_head/kernel")
    )
    checkpoints = Checkpoints(workdir)
    checkpoints.save_frozen(frozen)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        step=zero + 1,
        params=trained,
        frozen=frozen,
        opt_state={},
        ema={},
        key=jax.random.key(0),
        skipped=zero,
        skipped_in_row=zero,
    )
    checkpoints.save(state, {}, {})
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, combine(trained, frozen), params)


def test_the_text_model_of_a_multimodal_reward_model(tmp_path: pathlib.Path) -> None:
    """A Gemma 3 with an image tower is read, and exported, as its text model."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=make_config("gemma3"),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=95,
        num_labels=1,
    )
    theirs = Gemma3ForSequenceClassification(config).eval()
    theirs.set_attn_implementation("eager")
    randomize(theirs, 3)
    theirs.save_pretrained(tmp_path / "both")
    tokens_BT, mask_BT = padded_rows(90, pad=0)
    reference = their_scores(theirs, tokens_BT, mask_BT)
    loaded = load_model(str(tmp_path / "both"))
    assert_close(our_scores(loaded.model, loaded.params, tokens_BT, mask_BT), reference)
    export_hf(
        tmp_path / "text",
        config=loaded.config,
        params=loaded.params,
        tokenizer=None,
        original=loaded.original,
    )
    text = reread(tmp_path / "text")
    assert text.config.model_type == "gemma3_text"
    assert_close(their_scores(text, tokens_BT, mask_BT), reference)
