"""The sentiment reward with its real classifier, on real reviews."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys

import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.rewards import sentiment
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.workers import PythonReward, RewardWorkers


@pytest.fixture(scope="module")
def classifier(demo_path):
    if importlib.util.find_spec("spacy") is None:
        assert not os.environ.get("CI"), "CI must not pass by skipping"
        pytest.skip("spacy is not installed (pip install -e '.[sentiment]')")
    return demo_path("imdb_sentiment")


@pytest.fixture(scope="module")
def reviews(demo_path):
    lines = demo_path("movie_openings").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def review(text, prompt=""):
    return Completion(prompt, (), text, (), "stop", {})


def test_praise_and_blame(classifier):
    """The values are the pipeline's own; they change only with the asset."""
    texts = ["A wonderful, moving film.", "A terrible waste of time.", ""]
    answers = [review(text) for text in texts]
    odds = sentiment.log_odds(answers)
    np.testing.assert_allclose(odds, [1.9826212, -2.7101318, 0.0], rtol=1e-5)
    assert [sentiment.log_odds([answer])[0] for answer in answers] == odds, "a batch changes nothing"
    # 1 / (1 + exp(-1.9826212)) = 1 / 1.137706 = 0.878962, and so on.
    np.testing.assert_allclose(sentiment.probability(answers), [0.878960, 0.062378, 0.5], rtol=1e-4)


def test_the_prompt_is_part_of_the_review(classifier):
    whole = sentiment.log_odds([review("A wonderful, moving film.")])
    assert sentiment.log_odds([review(" moving film.", "A wonderful,")]) == whole
    without = sentiment.log_odds([review(" moving film.", "A wonderful,")], with_prompt=False)
    assert without == sentiment.log_odds([review(" moving film.")]) != whole
    messages = Completion([{"role": "user", "content": "A wonderful,"}], (), " moving film.", (), "stop", {})
    assert sentiment.log_odds([messages]) == without


def test_a_reward_cannot_run_away(classifier):
    """The softmax of float32 underflows; log(2^-126) = -87.336545 is then the least there is."""
    odds = sentiment.log_odds([review("great " * 1000), review("awful " * 1000)])
    np.testing.assert_allclose(odds, [87.336545, -87.336545], rtol=1e-6)


def test_log_odds_of_two_probabilities():
    """log 0.8 - log 0.2 = log 4 = 1.386294; 1 - 1e-20 is 1 in any float, and the odds still are 1e20."""
    assert math.isclose(sentiment.log_odds_of(0.8, 0.2), 1.386294, rel_tol=1e-6)
    assert math.isclose(sentiment.log_odds_of(1.0, 1e-20), 46.051702, rel_tol=1e-6)
    assert math.isclose(sentiment.log_odds_of(0.0, 1.0), -87.336545, rel_tol=1e-6)


@pytest.mark.slow
def test_real_reviews_in_the_workers(classifier, reviews):
    """0.719 of all 12,264 were right when this was written; 600 of them differ from that by less than 0.06
    (three times sqrt(0.72 * 0.28 / 600) = 0.018)."""
    chosen = reviews[::20][:600]
    answers = [review(row["rest"], row["prompt"]) for row in chosen]
    reward = PythonReward("posttrain_jax.rewards.sentiment:log_odds", completions_per_call=64)
    with RewardWorkers({"sentiment": reward}, workers=1) as workers:
        found = workers.score(answers)["sentiment"]
    assert not any(found.counts.values())
    fresh = np.array([row["label"] == "fresh" for row in chosen])
    assert abs(np.mean((found.scores_N > 0) == fresh) - 0.719) < 0.06
    assert found.scores_N[fresh].mean() > 0 > found.scores_N[~fresh].mean()


def test_without_spacy(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    sentiment._pipeline.cache_clear()
    with pytest.raises(InputError) as caught:
        sentiment.log_odds([])
    assert str(caught.value) == (
        "The sentiment reward needs the package spacy; install it with pip install -e '.[sentiment]'."
    )
