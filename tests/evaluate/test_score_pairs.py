"""Comparisons of packed rows with the scores that the model gives to every completion alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algorithms.tiny import data_of, tiny_model, tiny_params
from contracts.tiny import make_mesh

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.score_pairs import score_pairs
from posttrain_jax.forward import completions
from posttrain_jax.forward.completions import reward_scores
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.models.io.source import Source
from posttrain_jax.models.reward_head import score_head_params, scores
from posttrain_jax.rewards.ensemble import Ensemble

ROWS = [
    {"prompt": "one ", "chosen": "yes", "rejected": "no", "weight": 2.0, "margin": 0.5},
    {"prompt": "two ", "chosen": "longer", "rejected": "no", "probability": 0.25, "margin": 1.0},
    {"prompt": "two ", "chosen": "undecided", "rejected": "no", "probability": 0.5},
    {"prompt": "two ", "chosen": "weightless", "rejected": "no", "weight": 0},
    {
        "prompt": "three ",
        "completions": ["a", "bc", "def"],
        "ratings": [{"ann": 1, "bob": 3}, {"ann": 3, "bob": 3}, {"bob": 1}],
    },
    {"prompt": "four ", "completion": "good", "label": True},
]


def member(seed: int) -> LoadedModel:
    model = tiny_model("llama")
    head = score_head_params(jax.random.key(seed), model.config.d_model, init="normal")
    params = {**tiny_params("llama"), "score_head": head}
    return LoadedModel(model.config, params, byte_tokenizer(), model, Source("tiny", "hf", None))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_of(ROWS, tmp_path_factory.mktemp("pairs"))


@functools.cache
def scoring():
    """(parameters, tokens `[1, T]`, how many of them) -> score."""

    def of(params, tokens_BT, count):
        segments_BT = (jnp.arange(tokens_BT.shape[1])[None] < count).astype(jnp.int32)
        output = tiny_model("llama").apply(params, tokens_BT, segment_ids_BT=segments_BT, logits=False)
        return scores(params["score_head"], output.hidden_BTD, jnp.full((1, 1), count - 1))[0, 0]

    return jax.jit(of)


def alone(loaded: LoadedModel, data, prompt: str, completion: str) -> float:
    """The score of a completion in a row of its own."""
    store = data.sources[0].store
    spans = [slice(a, b) for a, b in itertools.pairwise(store.offsets)]
    texts = [byte_tokenizer().decode(store.tokens[span], skip_special_tokens=True) for span in spans]
    tokens = np.asarray(store.tokens[spans[texts.index(prompt + completion)]])
    padded_BT = np.zeros((1, 32), np.int32)
    padded_BT[0, : len(tokens)] = tokens
    return float(scoring()(loaded.params, padded_BT, len(tokens)))


def test_pairs_by_hand(data):
    """One pair of weight 2; one turned round, for its label says 1/4; three among "a" (mean rating 2), "bc" (3) and
    "def" (1): bc over a by 1, bc over def by 2, a over def by 1. The completions end with one token more than they
    have letters. Ann did not rate def; bob sees a and bc alike."""
    members = [member(0), member(1)]
    (pairs,) = score_pairs(
        members,
        {"all": data},
        make_mesh(1, 1, 1),
        ensemble=Ensemble("min"),
        groups=4,
        share_prompt=True,
    )
    sides = [("one ", "yes", "no"), ("two ", "no", "longer")]
    sides += [("three ", "bc", "a"), ("three ", "a", "def"), ("three ", "bc", "def")]
    assert (pairs.split, pairs.length_unit) == ("all", "tokens")
    for number, scores_N, lengths_N in (
        (1, pairs.chosen_scores_N, pairs.chosen_lengths_N),
        (2, pairs.rejected_scores_N, pairs.rejected_lengths_N),
    ):
        want_EN = np.asarray([[alone(m, data, side[0], side[number]) for side in sides] for m in members])
        np.testing.assert_allclose(scores_N, want_EN.min(axis=0), atol=2e-5)
        by_member = pairs.member_chosen_scores_EN if number == 1 else pairs.member_rejected_scores_EN
        np.testing.assert_allclose(by_member, want_EN, atol=2e-5)
        assert lengths_N.tolist() == [len(side[number]) + 1 for side in sides]
    np.testing.assert_array_equal(pairs.margins_N, [0.5, -1, 1, 1, 2])
    np.testing.assert_array_equal(pairs.probabilities_N, [1, 0.75, 1, 1, 1])
    np.testing.assert_array_equal(pairs.weights_N, [2, 1, 1, 1, 1])
    assert pairs.groups_N.tolist() == [0, 1, 2, 2, 2]
    nan = np.nan
    np.testing.assert_array_equal(pairs.raters["ann"], [nan, nan, 1, nan, nan])
    np.testing.assert_array_equal(pairs.raters["bob"], [nan, nan, 0, 1, 1])


def test_every_source_and_split_is_scored_by_one_program(data, monkeypatch):
    traced = []

    def counted(params, batch, *, model, share_prompt):
        traced.append(share_prompt)
        return reward_scores(params, batch, model=model, share_prompt=share_prompt)

    def score(*splits: str) -> int:
        score_pairs(
            [member(0), member(1)],
            dict.fromkeys(splits, data),
            make_mesh(1, 1, 1),
            ensemble=Ensemble(),
            groups=4,
            share_prompt=True,
        )
        return len(traced)

    completions.reward_scores_of.cache_clear()
    monkeypatch.setattr(completions, "reward_scores", counted)
    try:
        once = score("all")
        assert once > 0
        assert score("all", "again") == once
    finally:
        completions.reward_scores_of.cache_clear()


def test_the_gain_is_the_mean_of_the_members(data):
    members = [member(0), member(1)]
    members[0].params["score_head"]["gain"] = jnp.float32(4)
    (pairs,) = score_pairs(
        members, {"all": data}, make_mesh(1, 1, 1), ensemble=Ensemble(), groups=4, share_prompt=True
    )
    assert pairs.gain == 2.5


def test_combinations_by_hand():
    """Scores 1 and 3: mean 2, the lowest 1, 2 - 0.5 x variance 1 = 1.5."""
    scores_SE = np.asarray([[1.0, 3.0]])
    assert Ensemble()(scores_SE) == 2
    assert Ensemble("min")(scores_SE) == 1
    assert Ensemble("uncertainty", 0.5)(scores_SE) == 1.5


@pytest.mark.parametrize(
    ("name", "coefficient", "message"),
    [
        ("median", 0.0, "use one of mean, min, uncertainty"),
        ("uncertainty", 0.0, "coefficient above 0 goes with uncertainty"),
        ("mean", 0.5, "coefficient above 0 goes with uncertainty"),
        ("uncertainty", -1.0, "coefficient above 0 goes with uncertainty"),
    ],
)
def test_a_combination_that_makes_no_sense(name, coefficient, message):
    with pytest.raises(InputError, match=message):
        Ensemble(name, coefficient)


def test_data_without_comparisons_are_refused(data):
    labels_alone = dataclasses.replace(data, sources=(data.sources[0].select(np.asarray([2, 3, 5])),))
    with pytest.raises(InputError, match=r"The split 'kto' .* holds no comparison"):
        score_pairs(
            [member(0)],
            {"all": data, "kto": labels_alone},
            make_mesh(1, 1, 1),
            ensemble=Ensemble(),
            groups=4,
            share_prompt=True,
        )
