"""Scores of prompts: the numbers of whole logits, on one device and on a mesh."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from posttrain_jax.core.sharding import make_mesh, tree_shardings
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.transformer import make_model
from posttrain_jax.serving.prompt_scores import row_tokens, score_prompts

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=96,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=64,
    max_length=128,
    query_scale=8**-0.5,
)
PROMPTS = [np.asarray(ids, np.int32) for ids in ([5, 6, 7, 8], [9], list(range(1, 17)))]


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.mark.parametrize("sharded", [False, True])
def test_scores_are_those_of_the_whole_logits(model, params, sharded):
    used = params
    if sharded:
        mesh = make_mesh(data=2, fsdp=2, tensor=2)
        used = jax.device_put(params, tree_shardings(model.abstract_params(), mesh))
    for prompt, scores in zip(PROMPTS, score_prompts(model, used, PROMPTS, alternatives=3), strict=True):
        logps_TV = np.asarray(jax.nn.log_softmax(model.apply(params, prompt[None]).logits_BTV[0]))
        places = np.arange(len(prompt))
        np.testing.assert_allclose(scores.logprobs, logps_TV[places[:-1], prompt[1:]], atol=1e-5)
        assert scores.alternatives.shape == scores.alternative_logprobs.shape == (len(prompt), 3)
        np.testing.assert_array_equal(scores.alternatives[:, 0], logps_TV.argmax(-1))
        np.testing.assert_allclose(
            scores.alternative_logprobs, np.take_along_axis(logps_TV, scores.alternatives, axis=1), atol=1e-5
        )
        assert (np.diff(scores.alternative_logprobs) <= 0).all()


def test_a_token_that_is_the_likeliest_has_the_likeliest_ones_number_to_the_last_bit(model, params):
    """Harnesses take a token for greedy if its log-probability equals the largest one."""
    prompt = [3]
    for _ in range(20):
        (scores,) = score_prompts(model, params, [np.asarray(prompt, np.int32)], alternatives=1)
        prompt.append(int(scores.alternatives[-1, 0]))
    (scores,) = score_prompts(model, params, [np.asarray(prompt, np.int32)], alternatives=1)
    assert scores.logprobs.tolist() == scores.alternative_logprobs[:-1, 0].tolist()


def test_rows_have_few_lengths():
    assert [row_tokens(n) for n in (1, 256, 257, 1024, 1025, 2049)] == [256, 256, 1024, 1024, 2048, 4096]
