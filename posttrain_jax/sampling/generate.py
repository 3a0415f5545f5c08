"""Batched generation with a KV cache: one prefill and one `lax.while_loop` of decode steps per shape.

Prompts are padded on the right (segment id 0) and every row keeps its own length in the cache, so a row's answer
does not depend on the rows beside it. Shapes are rounded up (rows, prompt length, answer length), so that a whole
file of prompts compiles a handful of programs. Memory: the parameters (never copied) and a cache of
2 * L * B * S * G * K numbers, S = rounded prompt + rounded answer; of the logits only `[B, V]` at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain_jax.errors import InputError
from posttrain_jax.models.transformer import Model, init_cache
from posttrain_jax.sampling.choose import Sampling, choose, sample_keys
from posttrain_jax.sharding import ambient_mesh
from posttrain_jax.types import Array, PyTree

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
      prompt: which prompt it answers (its place in the list).
      sample: which of the prompt's `num_samples` it is.
      tokens: int32 `[n]`; the stop token that ended it is the last of them.
      logprobs: float32 `[n]`, nats: the model's own log-probability of each token given what stands before it;
        temperature, top-k, top-p and `min_new_tokens` do not enter.
      finish_reason: "stop" (a stop token) or "length" (`max_new_tokens`, or the model's context is full).
    """

    prompt: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


def generate(
    model: Model,
    params: PyTree,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    ignore_eos: bool = False,
    batch_size: int = 8,
    names: Sequence[str] = (),
    start: int = 0,
) -> list[Sample]:
    """All answers, in order of prompt and sample. See `generate_batches`."""
    batches = generate_batches(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_samples=num_samples,
        seed=seed,
        ignore_eos=ignore_eos,
        batch_size=batch_size,
        names=names,
        start=start,
    )
    return [sample for batch in batches for sample in batch]


def generate_batches(
    model: Model,
    params: PyTree,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    ignore_eos: bool = False,
    batch_size: int = 8,
    names: Sequence[str] = (),
    start: int = 0,
) -> Iterator[list[Sample]]:
    """Answers batch by batch, in order of prompt and sample.

    What is drawn for a prompt depends on `seed`, the prompt's place, the sample's number and the place in the
    answer alone: not on `batch_size` or the other prompts.

    Args:
      model, params: parameters as `load_model` or a train state holds them, sharded or not. With several
        processes every one calls this alike and gets all answers.
      prompts: token ids, each a non-empty 1-D array.
      max_new_tokens: most tokens of an answer, the stop token included; 0 gives empty answers.
      stop_token_ids: an answer ends with one of these (`models.tokenizer.stop_token_ids`).
      min_new_tokens: stop tokens cannot be drawn before this many tokens.
      temperature, top_k, top_p: see `Sampling`.
      num_samples: answers per prompt.
      seed: of the random numbers.
      ignore_eos: stop tokens do not end an answer.
      batch_size: answers decoded side by side.
      names: what to call each prompt in an error; default "prompt 0", "prompt 1" ...
      start: skip that many answers (of the flat order prompt, sample); batches keep their boundaries, so that
        a run that goes on computes the same programs on the same rows.

    Raises:
      InputError: a bad option; an empty prompt, one that fills the model's context, or a token id that is not
        in the vocabulary. All prompts are checked before the first batch.
    """
    sampling = Sampling(temperature, top_k, top_p)
    check_counts(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        num_samples=num_samples,
        batch_size=batch_size,
    )
    rows = [np.asarray(prompt) for prompt in prompts]
    for index, row in enumerate(rows):
        check_prompt(model, row, names[index] if names else f"prompt {index}", max_new_tokens)
    return _batches(
        model,
        params,
        [row.astype(np.int32) for row in rows],
        _Plan(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            num_samples=num_samples,
            seed=seed,
            ignore_eos=ignore_eos,
            batch_size=batch_size,
            start=start,
            stop_token_ids=tuple(sorted(set(stop_token_ids))),
            sampling=sampling,
        ),
    )


def check_prompt(model: Model, prompt: np.ndarray, name: str, max_new_tokens: int) -> None:
    """Raises InputError, with the prompt's name, for a prompt that the model cannot answer."""
    config = model.config
    if prompt.ndim != 1 or prompt.size == 0:
        raise InputError(f"{name} has no tokens; a model needs at least one token to go on from.")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise InputError(f"{name} holds {prompt.dtype} values; token ids are whole numbers.")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        wrong = int(prompt[(prompt < 0) | (prompt >= config.vocab_size)][0])
        raise InputError(f"{name} holds the token id {wrong}; the model knows 0 to {config.vocab_size - 1}.")
    if prompt.size > config.max_length - (max_new_tokens > 0):
        raise InputError(
            f"{name} has {prompt.size} tokens, which leaves no room for an answer in the model's context of "
            f"{config.max_length}; shorten it."
        )


def check_counts(*, max_new_tokens: int, min_new_tokens: int, num_samples: int, batch_size: int) -> None:
    """Raises InputError for a number of tokens, samples or rows that makes no sense."""
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more.")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise InputError(
            f"min_new_tokens is {min_new_tokens}; it must lie between 0 and max_new_tokens ({max_new_tokens})."
        )
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}; it must be at least 1.")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The options of one call, checked."""

    max_new_tokens: int
    min_new_tokens: int
    num_samples: int
    seed: int
    ignore_eos: bool
    batch_size: int
    start: int
    stop_token_ids: tuple[int, ...]
    sampling: Sampling


def bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128 ...: at most a half more than asked for."""
    power = max(smallest, 1 << max(size - 1, 0).bit_length())
    return power * 3 // 4 if size <= power * 3 // 4 and power > smallest else power


def _batches(model: Model, params: PyTree, prompts: list[np.ndarray], plan: _Plan) -> Iterator[list[Sample]]:
    total = len(prompts) * plan.num_samples
    for first in range(0, total, plan.batch_size):
        wanted = range(first, min(first + plan.batch_size, total))
        if wanted[-1] < plan.start:
            continue
        places = [divmod(flat, plan.num_samples) for flat in wanted]
        if plan.max_new_tokens:
            samples = _answer(model, params, prompts, places, plan)
        else:
            empty = (np.zeros(0, np.int32), np.zeros(0, np.float32))
            samples = [Sample(prompt, number, *empty, "length") for prompt, number in places]
        yield samples[max(plan.start - first, 0) :]


def _answer(
    model: Model, params: PyTree, prompts: list[np.ndarray], places: list[tuple[int, int]], plan: _Plan
) -> list[Sample]:
    """One batch on the device."""
    mesh = _mesh_of(params)
    row_count = _row_bucket(len(places), plan.batch_size, mesh)
    longest = max(len(prompts[prompt]) for prompt, _ in places)
    tokens_BT = np.zeros((row_count, bucket(longest)), np.int32)
    lengths_B = np.zeros(row_count, np.int32)
    ids_B2 = np.zeros((row_count, 2), np.int32)
    for row, (prompt, number) in enumerate(places):
        lengths_B[row] = len(prompts[prompt])
        tokens_BT[row, : lengths_B[row]] = prompts[prompt]
        ids_B2[row] = prompt, number
    room_B = np.where(lengths_B > 0, model.config.max_length - lengths_B, 0)
    limits_B = np.minimum(room_B, plan.max_new_tokens).astype(np.int32)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        answers = _generate(
            params,
            tokens_BT,
            lengths_B,
            limits_B,
            ids_B2,
            np.uint32(plan.seed % 2**32),
            plan.min_new_tokens,
            model=model,
            capacity=bucket(plan.max_new_tokens),
            stop_token_ids=plan.stop_token_ids,
            ignore_eos=plan.ignore_eos,
            sampling=plan.sampling,
        )
    tokens_BN, logps_BN, counts_B, stopped_B = (np.asarray(part) for part in answers)
    return [
        Sample(
            prompt=prompt,
            sample=number,
            tokens=tokens_BN[row, : counts_B[row]].copy(),
            logprobs=logps_BN[row, : counts_B[row]].copy(),
            finish_reason="stop" if stopped_B[row] else "length",
        )
        for row, (prompt, number) in enumerate(places)
    ]


def _mesh_of(params: PyTree) -> Mesh | None:
    """The mesh that the parameters lie on, or None when it is a single device."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    assert isinstance(sharding.mesh, Mesh)  # of an array that exists
    return sharding.mesh


def _row_bucket(rows: int, batch_size: int, mesh: Mesh | None) -> int:
    """Rows of the compiled program: a power of two, at most `batch_size`, and a multiple of the row shards."""
    size = min(1 << (rows - 1).bit_length(), batch_size)
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-size // shards) * shards


def prefill(
    model: Model, params: PyTree, cache: dict[str, Array], tokens_BT: Array, lengths_B: Array
) -> tuple[dict[str, Array], Array]:
    """Appends prompts to the cache (`lengths_B` real tokens each, the rest is padding): the cache and the float32
    logits `[B, V]` of what follows the last real token. Only that one position meets the vocabulary."""
    real_BT = (jnp.arange(tokens_BT.shape[1])[None, :] < lengths_B[:, None]).astype(jnp.int32)
    output = model.apply(params, tokens_BT, segment_ids_BT=real_BT, cache=cache, logits=False)
    last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
    hidden_BD = jnp.take_along_axis(output.hidden_BTD, last_B11, axis=1)[:, 0]
    return output.cache, model.logits(params, hidden_BD)


def decode_step(
    model: Model, params: PyTree, cache: dict[str, Array], token_B: Array, live_B: Array
) -> tuple[dict[str, Array], Array]:
    """Appends one token to every live row: the cache and the logits `[B, V]` of the next one."""
    output = model.apply(
        params,
        token_B[:, None],
        segment_ids_BT=live_B.astype(jnp.int32)[:, None],
        cache=cache,
        logits=False,
    )
    return output.cache, model.logits(params, output.hidden_BTD[:, 0])


def next_token(
    logits_BV: Array,
    keys_B: Array,
    place: Array,
    stop_V: Array,
    *,
    min_new_tokens: Array | int,
    sampling: Sampling,
) -> tuple[Array, Array]:
    """The token at `place` (0, 1 ...) of every answer and the model's own log-probability of it: both `[B]`.

    `stop_V` is True at the stop tokens, which cannot be drawn while `place` is below `min_new_tokens`.
    """
    banned_V = stop_V & (place < min_new_tokens)
    allowed_BV = jnp.where(banned_V[None, :], -jnp.inf, logits_BV)
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, place))(keys_B)
    token_B = choose(allowed_BV, keys_B, sampling)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Decoding:
    """The loop's carry: `place` tokens of every live row are drawn, and `token_B` is the latest of them."""

    cache: dict[str, Array]
    token_B: Array
    place: Array
    live_B: Array
    stopped_B: Array
    counts_B: Array
    tokens_BN: Array
    logps_BN: Array


@functools.partial(jax.jit, static_argnames=("model", "capacity", "stop_token_ids", "ignore_eos", "sampling"))
def _generate(
    params: PyTree,
    tokens_BT: Array,
    lengths_B: Array,
    limits_B: Array,
    ids_B2: Array,
    seed: Array,
    min_new_tokens: Array,
    *,
    model: Model,
    capacity: int,
    stop_token_ids: tuple[int, ...],
    ignore_eos: bool,
    sampling: Sampling,
) -> tuple[Array, Array, Array, Array]:
    """Prefill and decode: tokens `[B, N]`, their log-probabilities, how many there are, whether they stopped."""
    rows, time = tokens_BT.shape
    keys_B = sample_keys(seed, ids_B2[:, 0], ids_B2[:, 1])
    stop_V = jnp.zeros(model.config.vocab_size, bool)
    if stop_token_ids:
        stop_V = stop_V.at[jnp.asarray(stop_token_ids)].set(True, mode="drop")
    cache = init_cache(model.config, rows, time + capacity, model.dtype)
    cache, logits_BV = prefill(model, params, cache, tokens_BT, lengths_B)

    def draw(state: _Decoding, cache: dict[str, Array], logits_BV: Array) -> _Decoding:
        token_B, logp_B = next_token(
            logits_BV, keys_B, state.place, stop_V, min_new_tokens=min_new_tokens, sampling=sampling
        )
        counts_B = state.counts_B + state.live_B
        stopped_B = jnp.zeros(rows, bool) if ignore_eos else state.live_B & stop_V[token_B]
        return _Decoding(
            cache=cache,
            token_B=token_B,
            place=state.place + 1,
            live_B=state.live_B & ~stopped_B & (counts_B < limits_B),
            stopped_B=state.stopped_B | stopped_B,
            counts_B=counts_B,
            tokens_BN=state.tokens_BN.at[:, state.place].set(token_B),
            logps_BN=state.logps_BN.at[:, state.place].set(logp_B),
        )

    def step(state: _Decoding) -> _Decoding:
        return draw(state, *decode_step(model, params, state.cache, state.token_B, state.live_B))

    state = _Decoding(
        cache={},
        token_B=jnp.zeros(rows, jnp.int32),
        place=jnp.int32(0),
        live_B=limits_B > 0,
        stopped_B=jnp.zeros(rows, bool),
        counts_B=jnp.zeros(rows, jnp.int32),
        tokens_BN=jnp.zeros((rows, capacity), jnp.int32),
        logps_BN=jnp.zeros((rows, capacity), jnp.float32),
    )
    state = draw(state, cache, logits_BV)
    state = jax.lax.while_loop(lambda state: jnp.any(state.live_B), step, state)
    answers = (state.tokens_BN, state.logps_BN, state.counts_B, state.stopped_B)
    if ambient_mesh() is not None:
        answers = jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), answers)
    return answers
