"""The score head: how it starts, what it reads, its gradient, its place on a mesh, and its way through files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import jit_step, make_mesh, tree_shardings
from posttrain_jax.core.types import PyTree, TrainState
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.export import export_hf, write_model_folder
from posttrain_jax.models.io.load import (
    load_members,
    load_model,
    require_language_model,
    require_score_head,
)
from posttrain_jax.models.io.source import is_reward_model, load_config, member_count, resolve
from posttrain_jax.models.io.tokenizer import scoring_pad_id
from posttrain_jax.models.reward_head import abstract_score_head, fold_gain, score_head_params, scores
from posttrain_jax.models.transformer import make_model
from posttrain_jax.run.checkpoint import Checkpoints

CONFIG = ModelConfig("llama", 24, 16, 2, 4, 2, 4, 32, query_scale=0.5, pad_token_id=0, eos_token_ids=(2,))
UNTIED = dataclasses.replace(CONFIG, tied_embeddings=False)
HEAD = {
    "kernel": jnp.asarray([[1.0], [-2.0]]),
    "gain": jnp.float32(0.5),
    "bias": jnp.float32(3.0),
}


def reward_params(
    config: ModelConfig, *, gain: float = 1.0, bias: float = 0.0, lora: LoraConfig | None = None
):
    params = make_model(config, lora=lora).init(jax.random.key(0))
    head = score_head_params(jax.random.key(1), config.d_model, init="normal")
    return {**params, "score_head": {**head, "gain": jnp.float32(gain), "bias": jnp.float32(bias)}}


def score_rows(loaded_model, params: PyTree) -> np.ndarray:
    tokens_BT = np.random.default_rng(0).integers(3, 24, (3, 7))
    out = loaded_model.apply(params, jnp.asarray(tokens_BT), logits=False)
    return np.asarray(scores(params["score_head"], out.hidden_BTD, jnp.asarray([[6], [3], [0]])))


def test_scores_by_hand():
    """Row 0: h = (3, 1) at place 2 and (0, 1) at place 0: 0.5 (3 - 2) + 3 = 3.5; 0.5 (0 - 2) + 3 = 2.
    Row 1: h = (4, 0) at place 1, twice: 0.5 * 4 + 3 = 5."""
    hidden_BTD = jnp.asarray([[[0.0, 1.0], [9.0, 9.0], [3.0, 1.0]], [[7.0, 7.0], [4.0, 0.0], [8.0, 8.0]]])
    found = scores(HEAD, hidden_BTD, jnp.asarray([[2, 0], [1, 1]]))
    np.testing.assert_array_equal(found, [[3.5, 2.0], [5.0, 5.0]])


def test_scores_of_half_precision_states_are_float32():
    """1 + 2^-8 = 1.00390625 is no bfloat16 (2^-7 is its step above 1), so the sum is taken in float32."""
    hidden_BTD = jnp.asarray([[[1.0, 0.00390625]]], jnp.bfloat16)
    head = {**HEAD, "kernel": jnp.ones((2, 1)), "gain": jnp.float32(1), "bias": jnp.float32(0)}
    found = scores(head, hidden_BTD, jnp.zeros((1, 1), jnp.int32))
    assert found.dtype == jnp.float32
    assert float(found[0, 0]) == 1.00390625


def test_only_the_ends_get_a_gradient():
    """d score / d h = gain * kernel = (0.5, -1) at the end, 0 elsewhere; twice that where two ends coincide."""
    gradient = jax.grad(lambda h: jnp.sum(scores(HEAD, h, jnp.asarray([[1, 1]]))))(jnp.ones((1, 3, 2)))
    np.testing.assert_array_equal(gradient, [[[0, 0], [1.0, -2.0], [0, 0]]])


def test_how_a_head_starts():
    """Standard deviation 1 / sqrt(D + 1) = 0.01562 for D = 4095; of 4,095 draws it is within 4 %."""
    head = score_head_params(jax.random.key(0), 4095, init="normal")
    assert head["kernel"].shape == (4095, 1) and head["kernel"].dtype == jnp.float32
    assert abs(float(head["kernel"].std()) * 64 - 1) < 0.04
    assert (float(head["gain"]), float(head["bias"])) == (1.0, 0.0)
    zeros = score_head_params(jax.random.key(0), 8, init="zeros")
    assert not zeros["kernel"].any()
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_score_head(8))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), zeros)
    with pytest.raises(InputError, match="'ones'; use normal or zeros"):
        score_head_params(jax.random.key(0), 8, init="ones")


def test_on_a_mesh_the_head_is_whole_and_the_scores_are_equal():
    """`score_head/kernel` must not be taken for the vocabulary projection, `head/kernel`."""
    params = reward_params(CONFIG)
    model = make_model(CONFIG)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    places = tree_shardings(params, mesh)
    assert all(place.spec == P() for place in jax.tree.leaves(places["score_head"]))
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(3, 24, (8, 7)))
    ends_BN = jnp.asarray(np.random.default_rng(1).integers(0, 7, (8, 2)))

    def step(params: PyTree, tokens_BT: jax.Array, ends_BN: jax.Array) -> jax.Array:
        hidden_BTD = model.apply(params, tokens_BT, logits=False).hidden_BTD
        return scores(params["score_head"], hidden_BTD, ends_BN)

    sharded = jit_step(step, mesh, in_shardings=None, out_shardings=None)(
        jax.device_put(params, places), tokens_BT, ends_BN
    )
    np.testing.assert_allclose(sharded, step(params, tokens_BT, ends_BN), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
@pytest.mark.parametrize("shard_bytes", [5e9, 4000])
def test_round_trip_is_bit_exact(config: ModelConfig, shard_bytes: float, tmp_path: pathlib.Path):
    """Gain 1: every bit; the vocabulary projection is not written, and the config says that there is none."""
    params = reward_params(config, bias=-1.25)
    export_hf(tmp_path / "m", config=config, params=params, tokenizer=None, max_shard_bytes=shard_bytes)
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"]
    assert (fields["num_labels"], fields["score_bias"], fields["pad_token_id"]) == (1, -1.25, 0)
    names = {name for file in (tmp_path / "m").glob("*.safetensors") for name in load_file(file)}
    assert "score.weight" in names and "lm_head.weight" not in names
    loaded = load_model(str(tmp_path / "m"))
    expected = {name: part for name, part in params.items() if name != "head"}
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    assert loaded.config.tied_embeddings
    np.testing.assert_array_equal(
        score_rows(loaded.model, loaded.params), score_rows(make_model(config), params)
    )
    # and once more, with what the folder came with
    export_hf(
        tmp_path / "again",
        config=loaded.config,
        params=loaded.params,
        tokenizer=None,
        original={**loaded.original, "initializer_range": 0.5},
    )
    again = load_model(str(tmp_path / "again"))
    assert again.original["initializer_range"] == 0.5 and again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, expected)


def test_gain_is_folded_and_scores_stay(tmp_path: pathlib.Path):
    params = reward_params(CONFIG, gain=2.5, bias=0.75)
    kernel, bias = fold_gain(params["score_head"])
    np.testing.assert_array_equal(kernel, 2.5 * params["score_head"]["kernel"])
    assert bias == 0.75
    export_hf(tmp_path / "m", config=CONFIG, params=params, tokenizer=None)
    loaded = load_model(str(tmp_path / "m"))
    assert float(loaded.params["score_head"]["gain"]) == 1.0
    np.testing.assert_allclose(
        score_rows(loaded.model, loaded.params), score_rows(make_model(CONFIG), params), rtol=1e-5, atol=1e-6
    )


def test_the_head_stays_float32_and_goes_onto_a_mesh(tmp_path: pathlib.Path):
    params = reward_params(CONFIG, bias=0.5)
    export_hf(tmp_path / "m", config=CONFIG, params=params, tokenizer=None)
    half = load_model(str(tmp_path / "m"), param_dtype="bfloat16").params
    assert half["embed"]["embedding"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, half["score_head"], params["score_head"])
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = load_model(str(tmp_path / "m"), mesh=mesh).params
    jax.tree.map(np.testing.assert_array_equal, spread, params)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(spread["score_head"])} == {8}


def test_an_adapter_is_merged(tmp_path: pathlib.Path):
    lora = LoraConfig(rank=2, alpha=8.0, targets=("q", "down"))
    params = reward_params(CONFIG, gain=0.5, bias=1.0, lora=lora)
    for block, name in (("attn", "q"), ("mlp", "down")):
        part = params["layers"][block][name]
        part["lora_b"] = jax.random.normal(jax.random.key(5), part["lora_b"].shape)
    expected = score_rows(make_model(CONFIG, lora=lora), params)
    export_hf(tmp_path / "m", config=CONFIG, params=params, tokenizer=None, lora=lora)
    loaded = load_model(str(tmp_path / "m"))
    np.testing.assert_allclose(score_rows(loaded.model, loaded.params), expected, rtol=1e-4, atol=1e-5)
    without = score_rows(make_model(CONFIG), params)  # which does not look at adapter leaves
    assert np.abs(without - expected).min() > 1e-3, "the adapter changes nothing, so the test shows nothing"


def test_the_one_kind_is_refused_for_the_other(tmp_path: pathlib.Path):
    params = reward_params(CONFIG)
    export_hf(tmp_path / "reward", config=CONFIG, params=params, tokenizer=None)
    language = {name: part for name, part in params.items() if name != "score_head"}
    export_hf(tmp_path / "language", config=CONFIG, params=language, tokenizer=None)
    reward, language_model = load_model(str(tmp_path / "reward")), load_model(str(tmp_path / "language"))
    assert is_reward_model(reward.source) and not is_reward_model(language_model.source)
    assert require_score_head(reward) is reward.params["score_head"]
    require_language_model(language_model)
    with pytest.raises(InputError, match="language has no score head"):
        require_score_head(language_model)
    with pytest.raises(InputError, match="reward is a reward model: it gives scores"):
        require_language_model(reward)
    assert reward.apply(reward.params, np.ones((1, 3), np.int32)).logits_BTV is None
    with pytest.raises(InputError, match="gives scores, no next token"):
        reward.model.apply(reward.params, jnp.ones((1, 3), jnp.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 3, "id2label": None, "label2id": None}, "with 3 labels is a classifier"),
        ({"num_labels": None, "id2label": None, "label2id": None}, "with 2 labels is a classifier"),
        ({"architectures": ["LlamaForCausalLM"]}, r"unknown tensors.*score\.weight"),
    ],
)
def test_what_is_no_reward_model(change: dict, message: str, tmp_path: pathlib.Path):
    export_hf(tmp_path / "m", config=CONFIG, params=reward_params(CONFIG), tokenizer=None)
    path = tmp_path / "m" / "config.json"
    fields = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path / "m"))


def test_labels_do_not_stay_in_a_language_model(tmp_path: pathlib.Path):
    """A language model whose config.json came from a reward model's folder."""
    export_hf(tmp_path / "m", config=CONFIG, params=reward_params(CONFIG, bias=2.0), tokenizer=None)
    original = load_model(str(tmp_path / "m")).original
    write_model_folder(tmp_path / "language", config=CONFIG, tokenizer=None, original=original)
    fields = json.loads((tmp_path / "language" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert not {"num_labels", "id2label", "label2id", "score_bias"} & set(fields)


def word_tokenizer(
    pad: str | None, words: tuple[str, ...], template: bool = False
) -> PreTrainedTokenizerFast:
    """Ids in the order of `words`, all of them special; "<eos>" is the EOS."""
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token=pad, extra_special_tokens=list(words)
    )
    if template:
        fast.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    return fast


def test_padding_is_never_what_ends_a_text():
    """transformers reads a score at the last token that is not padding."""
    config = dataclasses.replace(CONFIG, pad_token_id=None, eos_token_ids=(1,))
    words = ("<a>", "<eos>", "<turn>", "<b>", "<my_pad>")
    assert scoring_pad_id(config, word_tokenizer("<b>", words)) == 3  # its own, which ends nothing
    assert scoring_pad_id(config, word_tokenizer("<eos>", words)) == 4  # it is named so
    assert scoring_pad_id(config, word_tokenizer("<turn>", words[:4], template=True)) == 0
    assert (
        scoring_pad_id(dataclasses.replace(config, eos_token_ids=(1, 0)), word_tokenizer(None, words[:4]))
        == 2
    )
    assert scoring_pad_id(dataclasses.replace(config, pad_token_id=7), None) == 7
    for lost in (config, dataclasses.replace(config, pad_token_id=1)):
        with pytest.raises(InputError, match="no padding token other than"):
            scoring_pad_id(lost, None)
    with pytest.raises(InputError, match="no padding token other than"):
        scoring_pad_id(config, word_tokenizer(None, ("<eos>",)))


def test_the_folder_and_its_tokenizer_agree_on_the_padding(tmp_path: pathlib.Path):
    config = dataclasses.replace(CONFIG, vocab_size=260)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    write_model_folder(tmp_path / "model", config=config, tokenizer=tokenizer, reward=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    source = resolve(str(tmp_path))
    assert source.kind == "workdir" and is_reward_model(source)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert again.pad_token_id == load_config(source).pad_token_id != again.eos_token_id
    assert tokenizer.pad_token == "<|im_end|>", "the caller's tokenizer was changed"


def test_members_of_an_ensemble_in_a_workdir(tmp_path: pathlib.Path):
    """Three whole models, two checkpoints; the newest is damaged in the end, so the one before is taken."""
    members = [
        {
            **make_model(CONFIG).init(jax.random.key(n)),
            "score_head": reward_params(CONFIG, bias=n)["score_head"],
        }
        for n in range(3)
    ]
    stacked = {"members": jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)}
    write_model_folder(tmp_path / "model", config=CONFIG, tokenizer=None, reward=True)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"lora": {"rank": 0}}}))
    checkpoints = Checkpoints(tmp_path)
    zero = jnp.zeros((), jnp.int32)
    for step in (1, 2):
        params = jax.tree.map(lambda leaf, step=step: step * leaf, stacked)
        ema = jax.tree.map(lambda leaf: 0.5 * leaf, params)
        state = TrainState(zero + step, params, {}, {}, ema, jax.random.key(0), zero, zero)
        checkpoints.save(state, {}, {})
    checkpoints.close()
    source = resolve(str(tmp_path))
    assert member_count(source) == 3
    with pytest.raises(InputError, match=r"an ensemble of 3 reward models.*--member=0 \(to 2\)"):
        load_model(source)

    def assert_members(loaded, factor: float) -> None:
        assert len(loaded) == 3
        for got, want in zip(loaded, members, strict=True):
            want = jax.tree.map(lambda leaf: factor * leaf, want)
            jax.tree.map(np.testing.assert_array_equal, got.params, want)

    loaded = load_members(str(tmp_path))
    assert_members(loaded, 2)
    assert loaded[0].source.step == 2
    assert_members(load_members(f"{tmp_path}@1"), 1)
    assert_members(load_members(str(tmp_path), ema=True), 1)
    mesh = make_mesh(fsdp=8, data=1)
    split = load_members(str(tmp_path), mesh=mesh, param_dtype="bfloat16")[2].params
    kernel = split["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert (str(kernel.dtype), str(split["score_head"]["kernel"].dtype)) == ("bfloat16", "float32")
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "params")
    assert_members(load_members(str(tmp_path)), 1)
    with pytest.raises(InputError, match="no checkpoint of step 5"):
        load_members(f"{tmp_path}@5")


def test_any_other_model_is_its_only_member(tmp_path: pathlib.Path):
    params = reward_params(CONFIG)
    export_hf(tmp_path / "reward", config=CONFIG, params=params, tokenizer=None)
    (only,) = load_members(str(tmp_path / "reward"))
    jax.tree.map(np.testing.assert_array_equal, only.params, load_model(str(tmp_path / "reward")).params)
    language = {name: part for name, part in params.items() if name != "score_head"}
    export_hf(tmp_path / "language", config=CONFIG, params=language, tokenizer=None)
    with pytest.raises(InputError, match="language has no score head"):
        load_members(str(tmp_path / "language"))
