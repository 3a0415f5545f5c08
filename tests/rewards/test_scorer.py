"""Scores of rollouts: functions in real worker processes, real (random) reward models."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algorithms.tiny import untrained_reward_run

from configs.reward_model.smollm2_135m import get_config
from posttrain_jax.core.errors import InputError, StepNotTaken
from posttrain_jax.core.sharding import make_mesh
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import make_model
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.ensemble import Ensemble
from posttrain_jax.rewards.score_options import ScoreOptions
from posttrain_jax.rewards.scorer import RewardModel, Scorer, is_safety_prompt, load_reward_model
from posttrain_jax.rewards.thoughts import prompt_opens_thought
from posttrain_jax.rewards.workers import PythonReward

CONFIG = ModelConfig("llama", 260, 16, 2, 4, 2, 4, 32, query_scale=0.5, eos_token_ids=(257,))
LENGTH = "posttrain_jax.rewards.rules:token_count"
SOME = "tests.rollouts.letter_lengths:length_without_x"
SHORTER = "tests.rollouts.letter_lengths:negative_length"
KEEP = ScoreOptions(functions=(LENGTH,), workers=1)


def completions(texts: list[str], ended: list[bool], prompt: str = "Hi") -> list[Completion]:
    tokenizer = byte_tokenizer()
    prompt_ids = tuple(tokenizer(prompt)["input_ids"])
    return [
        Completion(
            prompt=prompt,
            prompt_ids=prompt_ids,
            text=text,
            token_ids=tuple(tokenizer(text)["input_ids"]),
            finish_reason="stop" if end else "length",
            row={"prompt": prompt},
            in_thought=prompt_opens_thought(tokenizer, list(prompt_ids)),
        )
        for text, end in zip(texts, ended, strict=True)
    ]


def scorer(options: ScoreOptions, **changes) -> Scorer:
    given = {"functions": {LENGTH: PythonReward(LENGTH)}, "models": {}, "micro_rows": 8, "row_length": 64}
    return Scorer(byte_tokenizer(), options=options, mesh=make_mesh(), **{**given, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, [2, 4, 6]),
        ({"weights": (-0.5,)}, [-1, -2, -3]),
        ({"free_tokens": 3, "per_token": 2.0}, [2, 4 - 2, 6 - 6]),
        ({"clip": 3.0}, [2, 3, 3]),
        ({"missing_eos": "replace"}, [2, -1, 6]),
        ({"missing_eos": "penalize", "missing_eos_value": 5.0}, [2, -1, 6]),
    ],
)
def test_how_components_become_a_score(change, want):
    """Lengths 2, 4 and 6; the second answer has no end."""
    with_options = scorer(dataclasses.replace(KEEP, **change))
    scored = with_options(completions(["ab", "abcd", "abcdef"], [True, False, True]), training=True)
    with_options.close()
    assert scored.scores.tolist() == want and scored.scores.dtype == np.float32
    assert scored.components[LENGTH].tolist() == [2, 4, 6] and scored.failures == {LENGTH: 0}


def test_an_answer_that_did_not_end_the_thought_of_its_prompt_has_no_result():
    """The prompt's tokens say that it opened the thought, as of a template that writes <think>; its row does not."""
    name = "posttrain_jax.rewards.rules:same_number"
    by_number = scorer(ScoreOptions(functions=(name,)), functions={name: PythonReward(name)})
    drawn = completions(["so 42", "so</think>42", "so 42"], [False, True, True], "6*7? <think>\n")
    row = {"messages": [{"role": "user", "content": "6*7?"}], "answer": "42"}
    drawn = [dataclasses.replace(one, prompt=row["messages"], row=row) for one in drawn]
    scored = by_number(drawn, training=True)
    by_number.close()
    assert scored.scores.tolist() == [0.0, 1.0, 0.0]


def test_a_function_that_fails_at_every_answer_is_refused():
    """By its first error and its place; a function beside it that works changes nothing, one good answer does."""
    name = "tests.rollouts.letter_lengths:wrong_column"
    functions = {one: PythonReward(one) for one in (LENGTH, name)}
    both = scorer(ScoreOptions(functions=tuple(functions), workers=1), functions=functions)
    drawn = completions(["ab", "cd"], [True, True])
    scored = both(drawn, training=True)
    with pytest.raises(StepNotTaken, match="wrong_column failed at all 2 completions") as raised:
        scored.require_scores()
    assert re.search(r"KeyError: 'solution' \(/.*letter_lengths\.py:\d+\)\. Correct it", str(raised.value))
    none = dataclasses.replace(
        scored,
        failed={"f": np.array([True, False]), "g": np.array([False, True])},
        has_score=np.zeros(2, bool),
    )
    with pytest.raises(StepNotTaken, match="Some reward function failed at every one of 2 completions"):
        none.require_scores()
    solved = dataclasses.replace(drawn[0], row={"solution": 3})
    both([solved, drawn[1]], training=True).require_scores()
    both.close()


@pytest.mark.slow
def test_scores_are_normalized_on_answers_of_the_start():
    """Lengths 2, 4, 6 have mean 4 and variance 8/3: of length 6 the score is 2 / sqrt(8/3), of length 1 -3 / sqrt(8/3).
    A price of length is not normalized: 0.5 for each of 6 - 4 tokens. One length alone has no variance."""
    priced = scorer(dataclasses.replace(KEEP, free_tokens=4, per_token=0.5))
    gain, bias = priced.normalize(completions(["ab", "abcd", "abcdef"], [True] * 3))
    scored = priced(completions(["abcdef", "a"], [True] * 2), training=False)
    with pytest.raises(InputError, match="2 completions of the policy at the start all have the score 1"):
        priced.normalize(completions(["a", "b"], [True] * 2))
    priced.close()
    deviation = (8 / 3) ** 0.5
    assert (gain, bias) == pytest.approx((1 / deviation, -4 / deviation))
    np.testing.assert_allclose(scored.scores, [2 / deviation - 1.0, -3 / deviation], rtol=1e-6)


def test_an_answer_that_a_function_fails_at_has_no_score():
    """Lengths 2, -, 4, -, where the last answer has no end and needs no function once its score is replaced. Where
    scores are normalized the mean is of 2 and 4 alone (deviation 1); -1 is what a failure shows."""
    failing = {SOME: PythonReward(SOME, failure_score=-1.0)}
    replaced = ScoreOptions(functions=(SOME,), missing_eos="replace", missing_eos_value=-9.0)
    four = completions(["ab", "x", "abcd", "xy"], [True, True, True, False])
    with contextlib.closing(scorer(replaced, functions=failing)) as scores:
        scored = scores(four, training=True)
        normalization = scores.normalize(four)
        with pytest.raises(InputError, match="failed at every completion of the policy at the start; .*an x"):
            scores.normalize(completions(["x", "xx"], [True, True]))
    assert scored.scores.tolist() == [2, -1, 4, -9]
    assert scored.has_score.tolist() == [True, False, True, True]
    assert scored.failures == {SOME: 2} and "an x" in scored.error
    assert normalization == (1.0, -3.0)


@pytest.mark.slow
def test_safety_or_helpfulness_by_prompt():
    """Safety = length, helpfulness = the negative of it, threshold 0.95 = log-odds 2.94: a safety prompt takes length
    6; of the others length 2 is below, so safety's 2, and length 4 is above, so helpfulness' -4. Mean 4/3; whitened
    for training alone."""
    options = ScoreOptions(functions=(LENGTH, SHORTER), aggregate="piecewise", safety_threshold=0.95)
    both = {name: PythonReward(name) for name in (LENGTH, SHORTER)}
    three = completions(["abcdef", "ab", "abcd"], [True] * 3)
    three = [dataclasses.replace(three[0], row={"prompt": "Hi", "is_safety": True}), *three[1:]]
    piecewise = scorer(options, functions=both)
    raw = piecewise(three, training=False).scores
    whitened = piecewise(three, training=True).scores
    piecewise.close()
    assert raw.tolist() == [6, 2, -4]
    np.testing.assert_allclose(whitened, (raw - 4 / 3) / raw.std(), rtol=1e-5)


def test_what_says_that_a_prompt_is_one_of_safety():
    assert all(is_safety_prompt({"is_safety": value}) for value in (True, 1, 1.0, "true", "True", "1"))
    for value in (False, 0, 0.0, "false", "FALSE", "0", None):
        assert not is_safety_prompt({"is_safety": value})
    assert not is_safety_prompt({"prompt": "Hi"})
    for value in ("yes", 2, [], "", 0.5):
        with pytest.raises(InputError, match="is_safety of the row .* write true or false"):
            is_safety_prompt({"prompt": "Hi", "is_safety": value})


def save_reward(folder, seed: int):
    config = dataclasses.replace(CONFIG, max_length=32)
    params = make_model(config).init(jax.random.key(seed))
    params.pop("head", None)
    head = score_head_params(jax.random.key(seed + 1), config.d_model, init="normal")
    export_hf(folder, config=config, params={**params, "score_head": head}, tokenizer=byte_tokenizer())
    return folder


@pytest.mark.slow
def test_a_reward_model_scores_the_last_token(tmp_path):
    """Against the model applied to prompt and answer alone, without padding; 3 completions in rows of 64 tokens."""
    mesh = make_mesh()
    name = str(save_reward(tmp_path / "reward", 0))
    options = ScoreOptions(models=(name,))
    reward = load_reward_model(name, options, mesh=mesh, dtype="float32")
    texts = ["ab", "xyz", "q"]
    scored = scorer(options, functions={}, models={name: reward})(
        completions(texts, [True] * 3), training=True
    )
    (member,) = reward.members
    kernel = np.asarray(member.params["score_head"]["kernel"])[:, 0]
    for text, score in zip(texts, scored.scores, strict=True):
        tokens = jnp.asarray([byte_tokenizer()("Hi" + text)["input_ids"]])
        hidden = jax.jit(lambda t: member.model.apply(member.params, t, logits=False).hidden_BTD)(tokens)
        assert score == pytest.approx(float(np.asarray(hidden)[0, -1] @ kernel), abs=1e-5)


@pytest.mark.slow
def test_an_ensemble_is_as_good_as_its_combination_says(tmp_path, monkeypatch):
    """Three members of a workdir with LoRA on one trunk, each also asked alone: mean, worst case, mean less 2 variances
    (arXiv:2310.02743)."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    config = get_config("tiny")
    config.model.lora.rank, config.reward.members, config.data.eval = 2, 3, ""
    config.mesh.data = config.train.rows_per_step = 8
    untrained_reward_run(config, tmp_path / "run")
    name, three = str(tmp_path / "run"), completions(["ab", "xyz", "q"], [True] * 3)
    options = ScoreOptions(models=(name,))

    def scored(reward: RewardModel) -> np.ndarray:
        return scorer(options, functions={}, models={name: reward})(three, training=True).scores

    def ensemble(combination: str, coefficient: float = 0.0) -> RewardModel:
        one = dataclasses.replace(options, ensemble=combination, coefficient=coefficient)
        return load_reward_model(name, one, mesh=make_mesh(), dtype="float32")

    mean = ensemble("mean")
    apart_EN = np.stack([scored(RewardModel([member], Ensemble())) for member in mean.members])
    assert apart_EN.shape == (3, 3) and apart_EN.std(axis=0).min() > 1e-3
    uncertain = apart_EN.mean(axis=0) - 2.0 * apart_EN.var(axis=0)
    np.testing.assert_allclose(scored(mean), apart_EN.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scored(ensemble("min")), apart_EN.min(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scored(ensemble("uncertainty", 2.0)), uncertain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_equal_completions_have_equal_scores_in_bfloat16(tmp_path):
    """Whatever else is in the batch: the advantage of equal completions is exactly 0 in RLOO."""
    name = str(save_reward(tmp_path / "reward", 0))
    options = ScoreOptions(models=(name,))
    reward = load_reward_model(name, options, mesh=make_mesh(), dtype="bfloat16")
    drawn = completions(["same words", "x", "same words", "other, longer words", "same words"], [True] * 5)
    scores = scorer(options, functions={}, models={name: reward})(drawn, training=True).scores
    assert scores[0] == scores[2] == scores[4] and len(set(scores.tolist())) == 3


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path):
    name = str(save_reward(tmp_path / "reward", 0))
    options = ScoreOptions(models=(name,))
    reward = load_reward_model(name, options, mesh=make_mesh(), dtype="float32")
    other = byte_tokenizer()
    other.add_tokens(["<more>"])
    with pytest.raises(
        InputError, match=r"another tokenizer \(.*260 tokens\) than the policy \(.*261 tokens"
    ):
        Scorer(
            other,
            functions={},
            models={name: reward},
            options=options,
            mesh=make_mesh(),
            micro_rows=8,
            row_length=64,
        )


def test_bad_options():
    with pytest.raises(InputError, match=r"score.missing_eos is 'drop'; use one of keep, replace, penalize"):
        dataclasses.replace(KEEP, missing_eos="drop")
    with pytest.raises(
        InputError, match="Nothing scores the completions; set score.functions or score.models"
    ):
        scorer(KEEP, functions={})
    with pytest.raises(InputError, match="score.aggregate is 'max'; use one of sum, piecewise"):
        dataclasses.replace(KEEP, aggregate="max")
    with pytest.raises(InputError, match="chooses between a safety and a helpfulness reward.* there are 1: "):
        dataclasses.replace(KEEP, aggregate="piecewise")
    with pytest.raises(InputError, match="score.safety_threshold is 1.5; it must be .*less than 1"):
        ScoreOptions(functions=("a", "b"), aggregate="piecewise", safety_threshold=1.5)
    with pytest.raises(InputError, match="score.weights .*inf"):
        dataclasses.replace(KEEP, weights=(float("inf"),))
    with pytest.raises(InputError, match="score.ensemble is 'max'; use one of mean, min, uncertainty"):
        dataclasses.replace(KEEP, ensemble="max")
    with pytest.raises(InputError, match="score.ensemble=uncertainty needs score.coefficient above 0"):
        dataclasses.replace(KEEP, ensemble="uncertainty")
    with pytest.raises(InputError, match="score.coefficient is 2, and score.ensemble=mean does not look"):
        dataclasses.replace(KEEP, coefficient=2.0)
    with pytest.raises(InputError, match="score.missing_eos_value is nan"):
        dataclasses.replace(KEEP, missing_eos_value=float("nan"))
