"""Ours: `sampling.generate`, as `launch.generate` calls it. Also measures what the machine could do (`roofline`)."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.generation_contract import Work, load_prompts, serve
from launch.entry import set_up_jax
from posttrain_jax.models.io.load import load_model
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.generate import GenerateOptions, generate


def main() -> None:
    """Serves the settings, or with --roofline prints the machine's rates and the model's bytes and FLOPs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=pathlib.Path, required=True)
    parser.add_argument("--roofline", action="store_true")
    flags = parser.parse_args()
    set_up_jax()
    loaded = load_model(str(flags.rows / "model"))
    if flags.roofline:
        weights = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
        config = loaded.config
        cache_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4
        print(json.dumps({"weights": weights, "cache_bytes_per_token": cache_token, **machine_rates()}))
        sys.exit()
    prompts = load_prompts(flags.rows)

    def run(work: Work) -> list[list[int]]:
        samples = generate(
            loaded.model,
            loaded.params,
            prompts[: work.prompts],
            GenerateOptions(
                max_new_tokens=work.lengths(),
                sampling=Sampling(temperature=float(work.samples > 1)),
                num_samples=work.samples,
                batch_size=work.batch,
                seed=0,
            ),
        )
        return [sample.tokens.tolist() for sample in samples]

    serve(run, {"jax": jax.__version__})


def machine_rates() -> dict[str, float]:
    """Bytes a second that are read and written where they lie, and FLOPs a second of a large float32 product; medians
    of 7."""
    big = jnp.zeros(1 << 27, jnp.float32)
    left, right = jnp.ones((2048, 576)), jnp.ones((576, 3072))
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0)  # a new array would cost page faults
    return {
        "copy_bytes_per_second": 2 * big.nbytes / _seconds(in_place, big),
        "flops_per_second": 2 * 2048 * 576 * 3072 / _seconds(lambda _: jnp.matmul(left, right), left),
    }


def _seconds(function: Callable[[jax.Array], jax.Array], value: jax.Array) -> float:
    """Of a call on what the call before returned."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        value = jax.block_until_ready(function(value))
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


if __name__ == "__main__":
    main()
