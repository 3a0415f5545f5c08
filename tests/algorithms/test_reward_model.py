"""Reward models: packed rows give the losses of plain arrays, and ensembles are their members."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts.tiny import make_mesh

from algorithms import tiny
from algorithms.tiny import assert_same, batch_of, data_of, ranked_data, tiny_model, tiny_params
from posttrain_jax.algorithms import reward_model
from posttrain_jax.core.types import PreferenceBatch, PyTree
from posttrain_jax.core.updates import used_micro_batches
from posttrain_jax.data.preference_groups import PreferenceData
from posttrain_jax.data.preference_rows import PreferenceRows, row_shape
from posttrain_jax.data.tokenized import TokenizeOptions
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.forward.completions import reward_scores
from posttrain_jax.losses import reward as losses
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.reward_head import score_head_params

OPTIONS = reward_model.Options(normalize="none", bootstrap=False)


def options_of(loss: str) -> reward_model.Options:
    """The loss with the numbers that it looks at."""
    return dataclasses.replace(
        OPTIONS,
        loss=loss,
        label_smoothing=0.1 if loss == "smoothed_label" else 0.0,
        margin_scale=0.5 if loss == "margin" else 1.0,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreferenceData:
    return ranked_data(tmp_path_factory.mktemp("ranked"))


def reward_params(family: str, seed: int = 0) -> PyTree:
    params = {name: part for name, part in tiny_params(family, seed).items() if name != "head"}
    width = tiny_model(family).config.d_model
    head = score_head_params(jax.random.key(seed), width, init="normal")
    return {**params, "score_head": {**head, "gain": jnp.float32(2), "bias": jnp.float32(0.5)}}


def loss_sum(params: PyTree, micro: PreferenceBatch, *, family: str, share: bool, options=OPTIONS):
    return reward_model.reward_losses(
        params, {}, micro, model=tiny_model(family), options=options, share_prompt=share
    )


def mean_gradient(family: str, batch: PreferenceBatch, mesh, *, share: bool):
    compute = functools.partial(loss_sum, family=family, share=share)
    return tiny.mean_gradient(compute, reward_params(family), batch, mesh)


# ---- the step


@pytest.fixture(scope="module")
def whole(data):
    """Loss, gradient and count of all rows in one micro-batch on one device."""
    mesh = make_mesh(1, 1, 1)
    batch = batch_of(data, mesh, share=True, micro_batches=1, length=128)
    return mean_gradient("llama", batch, mesh, share=True)


def test_a_shared_prompt_gives_the_same_scores_and_gradients(data, whole):
    """`tests/algorithms/test_dpo.py` has the same of hidden states in a model with windows and soft caps."""
    mesh = make_mesh(1, 1, 1)
    batches = {share: batch_of(data, mesh, share=share, micro_batches=1) for share in (False, True)}
    assert int(jnp.sum(batches[True].segment_ids != 0)) < int(jnp.sum(batches[False].segment_ids != 0))
    want = mean_gradient("llama", batches[False], mesh, share=False)
    assert_same(whole, want)
    head = want[1]["score_head"]
    assert float(head["gain"]) == float(head["bias"]) == 0  # they are set after the run, not trained
    scores = {}
    for share, batch in batches.items():
        rows = jax.tree.map(lambda leaf: leaf[0], batch)
        score = jax.jit(
            functools.partial(reward_scores, batch=rows, model=tiny_model("llama"), share_prompt=share)
        )
        scores[share] = by_sequence(score(reward_params("llama")), rows)
    assert sorted(scores[True]) == list(range(1, 1 + len(data.sources[0].store.lines)))
    for number, score in scores[True].items():
        assert score == pytest.approx(scores[False][number], rel=1e-4, abs=1e-4)


def by_sequence(values_BN, rows: PreferenceBatch) -> dict[int, float]:
    ids = np.asarray(rows.sequence_ids)
    return dict(zip(ids[ids != 0].tolist(), np.asarray(values_BN)[ids != 0].tolist(), strict=True))


@pytest.mark.parametrize(("mesh", "cuts"), [((1, 1, 1), 8), ((4, 1, 1), 2)])
def test_micro_batches_and_meshes_do_not_change_it(data, whole, mesh, cuts):
    """Eight places for seven prompts, in rows that hold several: some micro-batches are empty and left out."""
    devices = make_mesh(*mesh)
    batch = batch_of(data, devices, share=True, micro_batches=cuts, length=128)
    if cuts == 8:
        assert int(used_micro_batches(batch.segment_ids)) < 8
    assert_same(mean_gradient("llama", batch, devices, share=True), whole)


# ---- the losses


@dataclasses.dataclass(frozen=True)
class Plain:
    """The rows of ROWS without any packing: G prompts, at most 4 completions, C comparisons."""

    scores_GK: np.ndarray
    mask_GK: np.ndarray
    ranks_GK: np.ndarray
    ratings_GK: np.ndarray
    prompt_C: np.ndarray
    better_C: np.ndarray
    worse_C: np.ndarray
    weights_C: np.ndarray
    margins_C: np.ndarray
    probabilities_C: np.ndarray


ROWS = [
    {"prompt": "a ", "chosen": "yes", "rejected": "no", "weight": 2.0, "margin": "significantly better"},
    {"prompt": "b ", "chosen": "red", "rejected": "blue and green", "probability": 0.7},
    {
        "prompt": "c ",
        "chosen": "1",
        "rejected": "22",
        "weight": 0.5,
        "margin": 0.3,
        "probability": 0.2,
    },
    {"prompt": "d ", "completions": ["one", "two", "three", "four"], "scores": [3, 1, 1, 2]},
    {"prompt": "e ", "completions": ["five", "six", "seven"], "ranks": [2, 1, 3]},
    {"prompt": "f ", "completion": "eight", "rating": 1.5},
]


def plain_rows() -> Plain:
    """ROWS by hand. The scores are those of nobody. In prompt c the rejected one is better with 0.8. In
    prompt d the order is 0, 3, then 1 and 2 tied (a tie is no
    comparison), and margins are differences of the ratings; in e it is 1, 0, 2."""
    none = np.nan
    scores = [
        [0.5, -1, 0, 0],
        [0.2, 0.9, 0, 0],
        [-2, 1, 0, 0],
        [2, 0.3, -0.4, 1],
        [1.5, 0.1, 0.7, 0],
        [3, 0, 0, 0],
    ]
    pairs = [
        # prompt, better, worse, weight, margin, probability
        (0, 0, 1, 2, 1, 1),
        (1, 0, 1, 1, 0, 0.7),
        (2, 1, 0, 0.5, -0.3, 0.8),
        (3, 0, 1, 1, 2, 1),
        (3, 0, 2, 1, 2, 1),
        (3, 0, 3, 1, 1, 1),
        (3, 3, 1, 1, 1, 1),
        (3, 3, 2, 1, 1, 1),
        (4, 1, 0, 1, 0, 1),
        (4, 0, 2, 1, 0, 1),
        (4, 1, 2, 1, 0, 1),
    ]
    prompt, better, worse, weight, margin, probability = (np.asarray(c) for c in zip(*pairs, strict=True))
    return Plain(
        scores_GK=np.asarray(scores, np.float32),
        mask_GK=np.arange(4)[None] < np.asarray([2, 2, 2, 4, 3, 1])[:, None],
        ranks_GK=np.asarray(
            [[0, 1, 9, 9], [0, 1, 9, 9], [1, 0, 9, 9], [0, 2, 2, 1], [1, 0, 2, 9], [0, 9, 9, 9]]
        ),
        ratings_GK=np.asarray([[none] * 4, [none] * 4, [none] * 4, [3, 1, 1, 2], [none] * 4, [1.5, 0, 0, 0]]),
        prompt_C=prompt,
        better_C=better,
        worse_C=worse,
        weights_C=weight,
        margins_C=margin,
        probabilities_C=probability,
    )


def plain_loss(loss: str, plain: Plain, counts_G: np.ndarray):
    """The loss of `losses/reward.py` on arrays that were never packed; `counts_G` weighs the prompts."""
    chosen_C = jnp.asarray(plain.scores_GK[plain.prompt_C, plain.better_C])
    rejected_C = jnp.asarray(plain.scores_GK[plain.prompt_C, plain.worse_C])
    weights_C = jnp.asarray(plain.weights_C * counts_G[plain.prompt_C], jnp.float32)
    row_weights_G = np.asarray([2, 1, 0.5, 1, 1, 0])  # f has no comparison
    weights_G = jnp.asarray(counts_G * row_weights_G, jnp.float32)
    rated_GK = ~np.isnan(plain.ratings_GK) & plain.mask_GK
    ranked = (jnp.asarray(plain.scores_GK), jnp.asarray(plain.ranks_GK), jnp.asarray(plain.mask_GK))
    return {
        "bradley_terry": lambda: losses.bradley_terry_loss(chosen_C, rejected_C, weights_B=weights_C),
        "margin": lambda: losses.margin_loss(
            chosen_C, rejected_C, jnp.asarray(0.5 * plain.margins_C), weights_B=weights_C
        ),
        "soft_label": lambda: losses.soft_label_loss(
            chosen_C, rejected_C, jnp.asarray(plain.probabilities_C), weights_B=weights_C
        ),
        "smoothed_label": lambda: losses.smoothed_label_loss(
            chosen_C, rejected_C, label_smoothing=0.1, weights_B=weights_C
        ),
        "kwise": lambda: losses.kwise_loss(*ranked, weights_B=weights_G),
        "plackett_luce": lambda: losses.plackett_luce_loss(*ranked, weights_B=weights_G),
        "regression": lambda: losses.regression_loss(
            jnp.asarray(plain.scores_GK),
            jnp.asarray(np.nan_to_num(plain.ratings_GK)),
            weights_B=jnp.asarray(counts_G[:, None] * rated_GK, jnp.float32),
        ),
    }[loss]()


def packed(
    data: PreferenceData, values_GK: np.ndarray, order: list[int]
) -> tuple[PreferenceBatch, jax.Array]:
    """Prompts in this order in rows `[R, ...]`, and `values_GK` where their completions came to lie, `[R, N]`."""
    shape = row_shape([data], groups=len(order))
    source = PreferenceRows(data.sources[0], shape)
    rows = PreferenceBatch(
        **{name: jnp.asarray(leaf) for name, leaf in source.collate([source[i] for i in order]).items()}
    )
    ids = np.asarray(rows.sequence_ids)
    starts = data.sources[0].arrays.starts
    values = np.full(ids.shape, 7.0, np.float32)  # what stands in an empty place must not matter
    for group, (first, last) in enumerate(itertools.pairwise(starts)):
        for k in range(last - first):
            values[ids == first + k + 1] = values_GK[group, k]
    return rows, jnp.asarray(values)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> PreferenceData:
    return data_of(ROWS, tmp_path_factory.mktemp("mixed"))


@functools.cache
def scoring(options: reward_model.Options):
    return jax.jit(functools.partial(reward_model.score_losses, options=options))


@pytest.mark.parametrize("loss", reward_model.LOSSES)
def test_packed_rows_give_the_loss_of_plain_arrays(mixed, loss):
    """Also where a bootstrap drew some prompts not at all and others more than once."""
    plain = plain_rows()
    score = scoring(options_of(loss))
    for counts_G in (np.ones(6), np.asarray([3, 1, 0, 2, 1, 2])):
        rows, scores_BN = packed(mixed, plain.scores_GK, [4, 0, 3, 5, 2, 1])
        _, counts_BN = packed(mixed, np.repeat(counts_G[:, None], 4, axis=1), [4, 0, 3, 5, 2, 1])
        assert int(jnp.max(rows.group_ids)) > 1, "no row holds two prompts, so this shows nothing"
        total, metrics = score(scores_BN, rows, counts_BN)
        want = plain_loss(loss, plain, counts_G)
        np.testing.assert_allclose(total, jnp.sum(want.loss), rtol=1e-6)
        assert float(metrics["loss"].count) == float(want.count) > 0
        for name in want.metrics.keys() - {"loss"}:
            np.testing.assert_allclose(metrics[name].sum, want.metrics[name].sum, rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(metrics[name].count, want.metrics[name].count, err_msg=name)


def test_losses_by_hand(mixed):
    """Prompts a and d with the scores 1, 0 and 2, 1, 0, 0. log(1 + e^-m) is 0.126928, 0.313262, 0.693147, 1.313262 at
    m = 2, 1, 0, -1.

    Bradley-Terry: a has weight 2, 2 x 0.313262 = 0.626523. In d completion 0 is over 1 (m = 1), 2 and 3 (m = 2 each):
    0.567118; 3 is over 1 (m = -1) and 2 (m = 0): 2.006409. The sum is 3.200050, the weights 2 + 5 = 7.
    K-wise: a 2 x 0.313262, d (0.567118 + 2.006409) / C(4, 2) = 0.428921; the sum 1.055444, the weights 2 + 1.
    """
    scores_GK = np.zeros((6, 4), np.float32)
    scores_GK[0, :2], scores_GK[3] = [1, 0], [2, 1, 0, 0]
    rows, scores_BN = packed(mixed, scores_GK, [0, 3])
    for loss, total, count in (("bradley_terry", 3.200050, 7), ("kwise", 1.055444, 3)):
        score = scoring(options_of(loss))
        got, metrics = score(scores_BN, rows, jnp.ones_like(scores_BN))
        np.testing.assert_allclose(got, total, rtol=2e-6)
        assert float(metrics["loss"].count) == count


@pytest.mark.parametrize(
    ("texts", "max_length"),
    [(["a", "why", "a", "bb", "ccc"], 0), (["aaaa1", "why", "aaaa2", "bb", "ccc"], 6)],
)
def test_ranks_are_those_of_the_data_where_completions_are_the_same(texts, max_length, tmp_path):
    """Ranks 2, 1, 4, 5, 3; the first and third completion are the same tokens (the second time once cut to 6).

    Zero scores: Plackett-Luce is ln 5 + ln 4 + ln 3 + ln 2 = ln 120 = 4.787492, K-wise ln 2 = 0.693147. Scores 1, 3,
    1, 0, 2: the margins of the ten pairs are 2, 1, 2, 3 below the best, then -1, 0, 1, then 1, 2, then 1; with
    log(1 + e^-m) = 0.048587, 0.126928, 0.313262, 0.693147, 1.313262 at m = 3, 2, 1, 0, -1 the sum is
    0.048587 + 3 x 0.126928 + 4 x 0.313262 + 0.693147 + 1.313262 = 3.688828, of ten.
    """
    row = {"prompt": "x ", "completions": texts, "ranks": [2, 1, 4, 5, 3]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    data = build_preferences(
        str(path), byte_tokenizer(), TokenizeOptions(max_length=max_length), cache_dir=tmp_path
    )
    assert data.sources[0].report.lost == 1
    zeros = np.zeros((1, 5), np.float32)
    for loss, scores_GK, want in (
        ("plackett_luce", zeros, 4.787492),
        ("kwise", zeros, 0.693147),
        ("kwise", np.asarray([[1, 3, 1, 0, 2]], np.float32), 0.3688828),
    ):
        rows, scores_BN = packed(data, scores_GK, [0])
        score = scoring(options_of(loss))
        got, metrics = score(scores_BN, rows, jnp.ones_like(scores_BN))
        np.testing.assert_allclose(got, want, rtol=2e-6)
        assert float(metrics["loss"].count) == 1


def test_centering_is_added(mixed):
    """0.01 (1 + 0)^2 with weight 2 for prompt a."""
    scores_GK = np.zeros((6, 4), np.float32)
    scores_GK[0, 0] = 1
    rows, scores_BN = packed(mixed, scores_GK, [0])
    ones_BN = jnp.ones_like(scores_BN)
    plain, _ = scoring(OPTIONS)(scores_BN, rows, ones_BN)
    centered, _ = scoring(dataclasses.replace(OPTIONS, center=0.01))(scores_BN, rows, ones_BN)
    np.testing.assert_allclose(centered - plain, 0.02, rtol=1e-4)


def test_centering_of_rankings_is_a_mean_over_prompts_too(mixed):
    """Prompt d with the scores 1, 0, 0, 0: of its five comparisons three have (1 + 0)^2 and two 0^2, of C(4, 2) = 6
    shares: 0.01 x 3 / 6 for one prompt."""
    scores_GK = np.zeros((6, 4), np.float32)
    scores_GK[3, 0] = 1
    rows, scores_BN = packed(mixed, scores_GK, [3])
    ones_BN = jnp.ones_like(scores_BN)
    for loss in ("kwise", "plackett_luce"):
        options = options_of(loss)
        plain, _ = scoring(options)(scores_BN, rows, ones_BN)
        centered, _ = scoring(dataclasses.replace(options, center=0.01))(scores_BN, rows, ones_BN)
        np.testing.assert_allclose(centered - plain, 0.005, rtol=1e-4, err_msg=loss)


def test_an_even_soft_label_prefers_neither(tmp_path):
    """Bradley-Terry of the other row alone, -log s(1) = 0.313262. With soft labels -0.9 log s(1) - 0.1 log s(-1) =
    0.413262, and of the even one -0.5 log s(1) - 0.5 log s(-1) = 0.813262."""
    rows = [
        {"prompt": "a ", "chosen": "yes", "rejected": "no", "probability": 0.9},
        {"prompt": "b ", "chosen": "red", "rejected": "blue", "probability": 0.5},
    ]
    data = data_of(rows, tmp_path)
    batch, scores_BN = packed(data, np.asarray([[1, 0], [1, 0]], np.float32), [0, 1])
    ones_BN = jnp.ones_like(scores_BN)
    hard, metrics = scoring(OPTIONS)(scores_BN, batch, ones_BN)
    np.testing.assert_allclose(hard, 0.313262, rtol=1e-5)
    assert float(metrics["loss"].count) == 1
    soft, _ = scoring(dataclasses.replace(OPTIONS, loss="soft_label"))(scores_BN, batch, ones_BN)
    np.testing.assert_allclose(soft, 0.413262 + 0.813262, rtol=1e-5)


def test_held_out_losses_do_not_see_the_normalization(data):
    """The head (gain 2, bias 0.5) has the losses of one without; a regression is one of the scores as they are."""
    batch = batch_of(data, make_mesh(1, 1, 1), share=True, micro_batches=1, length=128)
    scaled = reward_params("llama")
    head = scaled["score_head"]
    plain = {**scaled, "score_head": {**head, "gain": jnp.float32(1), "bias": jnp.float32(0)}}

    def evaluated(params: PyTree, options: reward_model.Options) -> dict[str, float]:
        step = functools.partial(
            reward_model.eval_step, model=tiny_model("llama"), options=options, share_prompt=True
        )
        return {name: float(metric.sum) for name, metric in jax.jit(step)(params, batch).items()}

    centered = dataclasses.replace(OPTIONS, center=0.01)
    assert evaluated(scaled, centered) == pytest.approx(evaluated(plain, centered), rel=1e-4)
    regression = dataclasses.replace(OPTIONS, loss="regression")
    found, without = evaluated(scaled, regression), evaluated(plain, regression)
    assert found["eval/loss"] != pytest.approx(without["eval/loss"], rel=1e-2)


def test_a_reward_model_to_start_from_loses_its_gain():
    """Training sees the scores that it gives; of its bias only a regression does."""
    params = reward_params("llama")
    for loss, bias in (("bradley_terry", 0.0), ("regression", 0.5)):
        state = reward_model.init_state(
            params,
            jax.random.key(0),
            model=tiny_model("llama"),
            optimizer=optax.with_extra_args_support(optax.sgd(0.1)),
            ema_decay=0.0,
            options=options_of(loss),
        )
        head = state.params["score_head"]
        assert (float(head["gain"]), float(head["bias"])) == (1, bias)
        np.testing.assert_array_equal(head["kernel"], 2 * params["score_head"]["kernel"])


# ---- ensembles


def test_an_ensemble_is_its_members(data):
    """Three models vmapped: every one has the gradient that it has alone, and the loss is the mean of theirs."""
    rows = jax.tree.map(
        lambda leaf: leaf[0], batch_of(data, make_mesh(1, 1, 1), share=True, micro_batches=1, length=128)
    )
    members = [reward_params("llama", seed) for seed in range(3)]
    stacked = {"members": jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)}
    options = dataclasses.replace(OPTIONS, members=3)

    def gradients(options: reward_model.Options):
        compute = functools.partial(loss_sum, micro=rows, family="llama", share=True, options=options)
        return jax.jit(jax.value_and_grad(compute, has_aux=True))

    (total, metrics), gradient = gradients(options)(stacked)
    alone = gradients(OPTIONS)
    sums = []
    for number, params in enumerate(members):
        (value, one_metrics), want = alone(params)
        sums.append(float(value))
        assert_same(jax.tree.map(lambda leaf, n=number: leaf[n], gradient["members"]), want, tolerance=1e-5)
        assert float(metrics["loss"].count) == float(one_metrics["loss"].count)
    np.testing.assert_allclose(total, sum(sums), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].sum, sum(sums) / 3, rtol=1e-5)


def test_the_bootstrap_draws_prompts():
    """2,000 prompts of two completions: the same draw for both, whatever row and order they come in; other draws for
    another member or seed; Poisson(1), so mean and variance 1 (standard errors 1 / sqrt(2000) = 0.022 and 0.039)."""
    options = dataclasses.replace(OPTIONS, members=3, bootstrap=True)
    ids = np.arange(1, 4001, dtype=np.int32).reshape(250, 16)
    groups = np.tile(np.repeat(np.arange(1, 9, dtype=np.int32), 2), (250, 1))

    def draws(ids, groups, member: int, options=options) -> np.ndarray:
        batch = PreferenceBatch(
            **{
                field.name: jnp.zeros(ids.shape)
                for field in dataclasses.fields(PreferenceBatch)
                if field.name not in ("sequence_ids", "group_ids")
            },
            sequence_ids=jnp.asarray(ids),
            group_ids=jnp.asarray(groups),
        )
        return np.asarray(
            jax.jit(reward_model.prompt_draws, static_argnums=2)(batch, jnp.int32(member), options)
        )

    each = [draws(ids, groups, member) for member in range(3)]
    for drawn in each:
        np.testing.assert_array_equal(drawn[:, ::2], drawn[:, 1::2])
        once = drawn[:, ::2]
        assert abs(once.mean() - 1) < 0.08 and abs(once.var() - 1) < 0.15
        assert set(np.unique(once)) <= set(range(10))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        # Two independent Poisson(1) agree with probability sum (e^-1 / k!)^2 = 0.3085.
        assert abs((each[a] == each[b]).mean() - 0.3085) < 0.05
    order = np.random.default_rng(0).permutation(8)
    places = (2 * np.repeat(order, 2) + np.tile([1, 0], 8)).astype(
        np.int64
    )  # prompts shuffled, pairs turned round
    again = draws(ids[::-1, places], groups[::-1], 1)
    np.testing.assert_array_equal(again, each[1][::-1, places])
    assert (draws(ids, groups, 0, dataclasses.replace(options, seed=1)) != each[0]).any()
    assert (draws(ids, groups, 0, dataclasses.replace(options, bootstrap=False)) == 1).all()
