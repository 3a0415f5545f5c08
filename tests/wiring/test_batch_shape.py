"""The sizes of an iteration's batch."""

from __future__ import annotations

import numpy as np
import pytest
from contracts.tiny import make_mesh
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.ppo.letters import get_config
from posttrain_jax.forward.packed_rows import pack_indices
from posttrain_jax.rollouts.trajectory import BatchShape
from posttrain_jax.wiring.algorithms import read_experiment
from posttrain_jax.wiring.rollouts import batch_shape


def shape_of(prompts: int, micro: int, length: int, data: int = 1, minibatches: int = 1) -> BatchShape:
    config = get_config("tiny")
    config.train.rows_per_step, config.train.micro_rows, config.rollout.samples = prompts, micro, 1
    experiment = read_experiment(config.to_dict())
    return batch_shape(experiment, make_mesh(data, 1, 1), epochs=2, minibatches=minibatches, length=length)


@pytest.mark.parametrize(
    ("arguments", "micro_batches", "micro_rows", "row_length"),
    [
        # 8 completions of 64 tokens at once: two rows of four; four micro-batches of them.
        ({"prompts": 32, "micro": 8, "length": 64}, 4, 2, 256),
        # On 4 devices that split rows each has one row of 2 x 64.
        ({"prompts": 32, "micro": 8, "length": 64, "data": 4}, 4, 4, 128),
        # 2 x 400 tokens fit into 1024 and 4 x 400 do not: 4 rows of 800, rounded up to 896.
        ({"prompts": 16, "micro": 8, "length": 400, "minibatches": 2}, 1, 4, 896),
        # Longer completions have a row each.
        ({"prompts": 8, "micro": 4, "length": 1500}, 2, 4, 1536),
    ],
)
def test_rows_are_longer_and_fewer(arguments, micro_batches, micro_rows, row_length):
    shape = shape_of(**arguments)
    assert (shape.micro_batches, shape.micro_rows, shape.row_length) == (
        micro_batches,
        micro_rows,
        row_length,
    )


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), min_size=16, max_size=16))
def test_a_minibatch_of_any_lengths_fits(lengths):
    """Sixteen completions of up to 64 tokens, eight at once: never more than two rows of 512."""
    indices = pack_indices(
        np.asarray(lengths), np.arange(16), length=64, row_length=512, micro_batches=2, micro_rows=1
    )
    assert (indices < 16 * 64).sum() == sum(lengths)
