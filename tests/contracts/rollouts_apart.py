"""A process of two that make and score the same completions, on a mesh where their devices take turns, as a TPU slice's
hosts do. Prints the rows as the devices have them, and the scores of a reward function that draws.

python -m tests.contracts.rollouts_apart COORDINATOR PROCESS
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.sharding import jit_step, replicated
from posttrain_jax.data.prompts import Prompt
from posttrain_jax.forward.packed_rows import packed_rows
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.rewards.score_options import ScoreOptions
from posttrain_jax.rewards.scorer import Scorer
from posttrain_jax.rewards.workers import PythonReward
from posttrain_jax.rollouts.sampling import RolloutOptions, completion_of, trajectory_of
from posttrain_jax.rollouts.trajectory import BatchShape, put, stack
from posttrain_jax.sampling.generate import Sample

DRAWS = "tests.rollouts.letter_lengths:drawn"
ROWS = 8


def main() -> None:
    """Answer n is the token n alone."""
    coordinator, process = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(process))
    devices = np.asarray(jax.devices()).reshape(2, -1).T.reshape(-1, 1, 1)  # one of each process in turn
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    prompt = Prompt(np.asarray([5], np.int32), {"prompt": "a"}, "p:1")
    nothing = np.zeros(1, np.float32)
    samples = [Sample(0, 0, np.asarray([n], np.int32), nothing, nothing, "stop") for n in range(ROWS)]
    options = RolloutOptions(max_new_tokens=1, batch_size=1)
    trajectories = [trajectory_of(prompt, sample, options, policy_step=0) for sample in samples]
    trajectories = [dataclasses.replace(one, score=float(n)) for n, one in enumerate(trajectories)]
    shape = BatchShape(ROWS, 2, epochs=1, minibatches=1, micro_batches=2, micro_rows=4, row_length=2)
    batch = put(stack(trajectories, shape, np.arange(ROWS)[None]), mesh, has_reference=False, auxiliary={})
    whole = jit_step(lambda rows: rows, mesh, in_shardings=None, out_shardings=replicated(mesh))(batch)
    rows = packed_rows(whole.indices, whole.tokens, whole.response_mask)
    scorer = Scorer(
        byte_tokenizer(),
        functions={DRAWS: PythonReward(DRAWS)},
        models={},
        options=ScoreOptions(functions=(DRAWS,), workers=1),
        mesh=mesh,
        micro_rows=4,
        row_length=2,
    )
    drawn = scorer([completion_of(one, byte_tokenizer()) for one in trajectories], training=True)
    scorer.close()
    said = {
        "tokens": np.asarray(rows.tokens)[..., 1].ravel().tolist(),
        "scores": np.asarray(whole.scores).ravel().tolist(),
        "drawn": drawn.scores.tolist(),
        "failures": drawn.failures[DRAWS],
    }
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
