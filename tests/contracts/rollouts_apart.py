"""A process of two that make and score the same answers, on a mesh where their devices take turns, as a TPU slice's
hosts do. Prints the rows as the devices have them, and the scores of a reward function that draws.

python -m tests.contracts.rollouts_apart COORDINATOR PROCESS
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.sharding import jit_step, replicated
from posttrain_jax.data.prompts import Prompt
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.rewards.workers import PythonReward
from posttrain_jax.rollouts.draw import RolloutOptions, as_rows, put_rollouts
from posttrain_jax.rollouts.score import ScoreOptions, Scorer
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
    rollouts = as_rows([prompt] * ROWS, samples, RolloutOptions(1, 1.0, 1, 1, ()), row_length=2)
    batch = put_rollouts(rollouts, np.arange(ROWS, dtype=np.float32), mesh, micro_batches=2)
    whole = jit_step(lambda rows: rows, mesh, in_shardings=None, out_shardings=replicated(mesh))(batch)
    scorer = Scorer(
        byte_tokenizer(),
        functions={DRAWS: PythonReward(DRAWS)},
        models={},
        options=ScoreOptions({DRAWS: 1.0}),
        mesh=mesh,
        rows=ROWS,
        micro_batches=1,
        workers=1,
    )
    drawn = scorer(rollouts, training=True)
    scorer.close()
    said = {
        "tokens": np.asarray(whole.tokens)[..., 1].ravel().tolist(),
        "scores": np.asarray(whole.scores).ravel().tolist(),
        "drawn": drawn.scores.tolist(),
        "failures": drawn.failures[DRAWS],
    }
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
