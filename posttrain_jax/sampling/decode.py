"""What the engine runs on the device: `prefill` reads prompts, `fill` and `copy_row` put them into slots, `begin` draws
the first token of each completion, and `decode` draws further tokens for all slots.

A slot is a row of the cache and of the `State` of its completion. The functions take these and return them in the same
buffers (donated). The cache is one pair of arrays a layer, written in place. Every row's tokens lie at its indices 0,
1, 2 ..., so a completion is the same in every slot, and a prompt stays readable in its slot until the next one comes.

Few programs do all this, whatever the prompts: `prefill` has a few chunk lengths (`sampling/shapes.py`), `begin` as
many rows as there are slots, and only `decode` and what moves one layer depend on the length of the cache.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.sharding import BATCH_AXES, ambient_mesh, tensor_axis
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models import kv_cache
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import (
    SamplingRows,
    StaticSamplingOptions,
    ban_words,
    choose,
    penalize,
    sample_keys,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RequestBatch:
    """Requests as arrays, one row a request.

    Attributes:
      ids_B3: uint32, seed, prompt and sample: what the random numbers depend on.
      limit_B: int32, most new tokens.
      min_tokens_B: int32, no stop token before so many.
      stop_BW: int32 token ids that end the completion, -1 where there are fewer.
      prompt_end_BW: the prompt's last tokens, for bad words, -1 where there are fewer; W = 0 without them.
      sampling: how tokens are drawn.
    """

    ids_B3: Array
    limit_B: Array
    min_tokens_B: Array
    stop_BW: Array
    prompt_end_BW: Array
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The completions in B slots, with room for N new tokens each; the cache is apart.

    Attributes:
      length_B: how many tokens of a slot are in the cache.
      requests: what each slot completes.
      keys_B: typed PRNG keys, one a sample.
      token_B: the latest token, which the cache does not hold yet.
      count_B: how many tokens were drawn.
      live_B: whether there are more to draw.
      stopped_B: whether a stop token ended the completion.
      tokens_BN, logps_BN, sample_logps_BN: the completions so far; see `Choice`.
      alternatives_BNK, alternative_logps_BNK: see `Choice`.
      prompt_BV, counts_BV: which tokens the prompt holds, and how often the completion holds each; V = 0 without
        penalties.
      recent_BW: the last tokens, for bad words; W = 0 without them.
    """

    length_B: Array
    requests: RequestBatch
    keys_B: Array
    token_B: Array
    count_B: Array
    live_B: Array
    stopped_B: Array
    tokens_BN: Array
    logps_BN: Array
    sample_logps_BN: Array
    alternatives_BNK: Array
    alternative_logps_BNK: Array
    prompt_BV: Array
    counts_BV: Array
    recent_BW: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillState:
    """P prompts in prefill; see `kv_cache.init_prefill_cache`.

    Attributes:
      k_LPSGK, v_LPSGK: keys and values so far.
      hidden_PD: the hidden state of each prompt's last token, from which the first new token is drawn.
    """

    k_LPSGK: Array
    v_LPSGK: Array
    hidden_PD: Array


@functools.partial(
    jax.jit, static_argnames=("model", "rows", "max_new_tokens", "static_options", "max_stop_tokens")
)
def empty_state(
    *,
    model: Model,
    rows: int,
    max_new_tokens: int,
    static_options: StaticSamplingOptions,
    max_stop_tokens: int,
) -> State:
    """The state of empty slots."""
    vocab = model.config.vocab_size if static_options.penalties else 0
    width = static_options.bad_words_context

    def zeros(*shape: int, dtype: str = "int32") -> Array:
        return jnp.zeros((rows, *shape), dtype)

    sampling = SamplingRows(
        **{
            field.name: zeros(dtype="int32" if field.name == "top_k_B" else "float32")
            for field in dataclasses.fields(SamplingRows)
        }
    )
    return State(
        length_B=zeros(),
        requests=RequestBatch(
            ids_B3=zeros(3, dtype="uint32"),
            limit_B=zeros(),
            min_tokens_B=zeros(),
            stop_BW=zeros(max_stop_tokens),
            prompt_end_BW=zeros(width),
            sampling=sampling,
        ),
        keys_B=sample_keys(0, zeros(), zeros()),
        token_B=zeros(),
        count_B=zeros(),
        live_B=zeros(dtype="bool"),
        stopped_B=zeros(dtype="bool"),
        tokens_BN=zeros(max_new_tokens),
        logps_BN=zeros(max_new_tokens, dtype="float32"),
        sample_logps_BN=zeros(max_new_tokens, dtype="float32"),
        alternatives_BNK=zeros(max_new_tokens, static_options.alternatives),
        alternative_logps_BNK=zeros(max_new_tokens, static_options.alternatives, dtype="float32"),
        prompt_BV=zeros(vocab, dtype="bool"),
        counts_BV=zeros(vocab),
        recent_BW=zeros(width),
    )


@functools.partial(jax.jit, static_argnames=("model", "rows", "length"))
def empty_layers(*, model: Model, rows: int, length: int) -> list[PyTree]:
    """A cache with nothing in it; see `kv_cache.init_layers`."""
    return _split(kv_cache.init_layers(model.config, rows, length, model.dtype), rows_axis=0, heads_axis=1)


@functools.partial(jax.jit, static_argnames=("model", "rows", "length"))
def empty_prefill(*, model: Model, rows: int, length: int) -> PrefillState:
    """Room for `rows` prompts of `length` tokens."""
    kv = kv_cache.init_prefill_cache(model.config, rows, length, model.dtype)
    kv = _split(kv, rows_axis=1, heads_axis=3)
    return PrefillState(kv["k"], kv["v"], jnp.zeros((rows, model.config.d_model), model.dtype))


def _split(arrays: PyTree, *, rows_axis: int, heads_axis: int) -> PyTree:
    """The arrays with their rows over data and fsdp, and their key heads over tensor where they divide."""
    mesh = ambient_mesh()
    if mesh is None:
        return arrays

    def one(leaf: Array) -> Array:
        axes: list[tuple[str, ...] | str | None] = [None] * leaf.ndim
        axes[rows_axis] = BATCH_AXES
        axes[heads_axis] = tensor_axis(leaf.shape[heads_axis], mesh)
        return jax.lax.with_sharding_constraint(leaf, P(*axes))

    return jax.tree.map(one, arrays)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def prefill(
    params: PyTree, state: PrefillState, tokens_PT: Array, start: Array, lengths_P: Array, *, model: Model
) -> PrefillState:
    """Reads the next T tokens of P prompts, from index `start` on.

    Args:
      params: stacked layers, as they are trained.
      state: what was read of them before.
      tokens_PT: padded on the right where a prompt has fewer.
      start: int32 scalar, the same for all.
      lengths_P: lengths of the whole prompts.
    """
    kv = {"k": state.k_LPSGK, "v": state.v_LPSGK}
    hidden_PTD, kv = model.prefill(params, tokens_PT, start=start, cache=kv)
    kv = _split(kv, rows_axis=1, heads_axis=3)
    last_P, time = lengths_P - 1 - start, tokens_PT.shape[1]
    hidden_P1D = jnp.take_along_axis(hidden_PTD, jnp.clip(last_P, 0, time - 1)[:, None, None], axis=1)
    is_here_P1 = ((last_P >= 0) & (last_P < time))[:, None]
    return PrefillState(kv["k"], kv["v"], jnp.where(is_here_P1, hidden_P1D[:, 0], state.hidden_PD))


# What moves prompts works on one layer: one small program serves all layers, where one that moves all of them together
# takes seconds to compile.


@functools.partial(jax.jit, donate_argnames="layer")
def fill(layer: PyTree, state: PrefillState, number: Array, slot_P: Array) -> PyTree:
    """Layer `number` of the cache with the P prefilled prompts put into slots (one out of range = nowhere)."""
    length = layer["v"].shape[2]

    def of_layer(array_LPSGK: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(array_LPSGK, number, keepdims=False)[:, :length]

    layer = kv_cache.put_rows(layer, of_layer(state.k_LPSGK), of_layer(state.v_LPSGK), slot_P)
    return _split(layer, rows_axis=0, heads_axis=1)


@functools.partial(jax.jit, donate_argnames="layer")
def copy_row(layer: PyTree, source: Array, slot: Array) -> PyTree:
    """A layer of the cache with one slot copied into another (out of range = none)."""
    layer = jax.tree.map(lambda leaf: leaf.at[slot].set(leaf[source], mode="drop"), layer)
    return _split(layer, rows_axis=0, heads_axis=1)


@functools.partial(jax.jit, static_argnames="length")
def grow(layer: PyTree, *, length: int) -> PyTree:
    """A layer of the cache made longer."""
    return _split(kv_cache.grow(layer, length), rows_axis=0, heads_axis=1)


@functools.partial(jax.jit, static_argnames=("model", "static_options"), donate_argnames="state")
def begin(
    params: PyTree,
    state: State,
    hidden_RD: Array,
    length_R: Array,
    prompt_RV: Array,
    slot_R: Array,
    requests_R: RequestBatch,
    *,
    model: Model,
    static_options: StaticSamplingOptions,
) -> State:
    """Draws the first token of the completions of R prompts that the cache holds.

    Args:
      params: for the vocabulary projection.
      state: of the slots.
      hidden_RD: the hidden state of each prompt's last token.
      length_R: its length in tokens.
      prompt_RV: bool, which tokens it holds; V = 0 without penalties.
      slot_R: its slot (out of range = nowhere, so that R can be padded).
      requests_R: how it is completed.
    """

    def put(old_B: Array, new_R: Array) -> Array:
        return old_B.at[slot_R].set(new_R.astype(old_B.dtype), mode="drop")

    rows = state.length_B.shape[0]
    key_R = jax.vmap(lambda ids: sample_keys(ids[0], ids[1:2], ids[2:3])[0])(requests_R.ids_B3)
    zero_R = jnp.zeros(slot_R.shape, jnp.int32)
    state = dataclasses.replace(
        state,
        length_B=put(state.length_B, length_R),
        requests=jax.tree.map(put, state.requests, requests_R),
        keys_B=state.keys_B.at[slot_R].set(key_R, mode="drop"),
        count_B=put(state.count_B, zero_R),
        stopped_B=put(state.stopped_B, zero_R),
        prompt_BV=put(state.prompt_BV, prompt_RV),
        counts_BV=state.counts_BV.at[slot_R].set(0, mode="drop"),
        recent_BW=put(state.recent_BW, requests_R.prompt_end_BW),
    )
    logits_RV = model.logits(params, hidden_RD)
    logits_BV = jnp.zeros((rows, logits_RV.shape[1]), jnp.float32).at[slot_R].set(logits_RV, mode="drop")
    new_B = jnp.zeros(rows, bool).at[slot_R].set(True, mode="drop")
    return _draw_tokens(state, logits_BV, new_B, static_options, keep_live_B=state.live_B)


def _draw_tokens(
    state: State, logits_BV: Array, active_B: Array, static_options: StaticSamplingOptions, keep_live_B: Array
) -> State:
    """Draws a token for every active row and appends it; `keep_live_B` says which other rows stay live."""
    requests = state.requests
    allowed_BV = logits_BV
    rows_B1 = jnp.arange(active_B.shape[0])[:, None]
    if static_options.penalties:
        allowed_BV = penalize(allowed_BV, state.prompt_BV, state.counts_BV, requests.sampling)
    if static_options.bad_words:
        allowed_BV = ban_words(allowed_BV, state.recent_BW, static_options.bad_words)
    if static_options.min_tokens:
        early_B1 = (state.count_B < requests.min_tokens_B)[:, None] & (requests.stop_BW >= 0)
        banned_BW = jnp.where(early_B1, requests.stop_BW, allowed_BV.shape[1])
        allowed_BV = allowed_BV.at[rows_B1, banned_BW].set(-jnp.inf, mode="drop")
    choice = choose(logits_BV, allowed_BV, state.keys_B, state.count_B, requests.sampling, static_options)
    token_B = jnp.where(active_B, choice.token_B, state.token_B)
    index_B = jnp.where(active_B, state.count_B, state.tokens_BN.shape[1])

    def write(old_BN: Array, new_B: Array) -> Array:
        return old_BN.at[rows_B1[:, 0], index_B].set(new_B, mode="drop")

    stopped_B = active_B & jnp.any(token_B[:, None] == requests.stop_BW, axis=1)
    count_B = state.count_B + active_B
    counts_BV, recent_BW = state.counts_BV, state.recent_BW
    if static_options.penalties:
        counts_BV = counts_BV.at[rows_B1[:, 0], token_B].add(active_B.astype(jnp.int32))
    if static_options.bad_words and recent_BW.shape[1]:
        moved_BW = jnp.concatenate([recent_BW[:, 1:], token_B[:, None]], axis=1)
        recent_BW = jnp.where(active_B[:, None], moved_BW, recent_BW)
    return dataclasses.replace(
        state,
        token_B=token_B,
        count_B=count_B,
        live_B=jnp.where(active_B, ~stopped_B & (count_B < requests.limit_B), keep_live_B),
        stopped_B=state.stopped_B | stopped_B,
        tokens_BN=write(state.tokens_BN, token_B),
        logps_BN=write(state.logps_BN, choice.logp_B),
        sample_logps_BN=write(state.sample_logps_BN, choice.sample_logp_B),
        alternatives_BNK=write(state.alternatives_BNK, choice.alternatives_BK),
        alternative_logps_BNK=write(state.alternative_logps_BNK, choice.alternative_logps_BK),
        counts_BV=counts_BV,
        recent_BW=recent_BW,
    )


@functools.partial(jax.jit, static_argnames=("model", "static_options"), donate_argnames=("layers", "state"))
def decode(
    params: PyTree,
    layers: list[PyTree],
    state: State,
    steps: Array,
    until_finished: Array,
    *,
    model: Model,
    static_options: StaticSamplingOptions,
) -> tuple[list[PyTree], State]:
    """Up to `steps` tokens for every live slot, in one loop on the device.

    It ends early when no slot is live, and with `until_finished` as soon as one completion ends, so that its slot can
    be given to the next request. `params` may hold `decoding.decode_layers`.
    """
    num_live = jnp.sum(state.live_B)
    index_1S = jnp.arange(layers[0]["v"].shape[2], dtype=jnp.int32)[None]
    positions_BS = jnp.where(index_1S < state.length_B[:, None], index_1S, -1)

    def is_unfinished(carry: tuple[Array, list[PyTree], Array, State]) -> Array:
        step, _, _, state = carry
        live = jnp.sum(state.live_B)
        return (step < steps) & (live > 0) & ~(until_finished & (live < num_live))

    def one_token(
        carry: tuple[Array, list[PyTree], Array, State],
    ) -> tuple[Array, list[PyTree], Array, State]:
        step, layers, positions_BS, state = carry
        live_B = state.live_B
        output = model.apply(
            params,
            state.token_B[:, None],
            segment_ids_BT=live_B.astype(jnp.int32)[:, None],
            cache={"layers": layers, "positions": positions_BS, "length": state.length_B},
            logits=False,
        )
        cache = output.cache
        state = dataclasses.replace(state, length_B=cache["length"])
        state = _draw_tokens(
            state, model.logits(params, output.hidden_BTD[:, 0]), live_B, static_options, keep_live_B=live_B
        )
        return step + 1, cache["layers"], cache["positions"], state

    carry = (jnp.int32(0), layers, positions_BS, state)
    _, layers, _, state = jax.lax.while_loop(is_unfinished, one_token, carry)
    return _split(layers, rows_axis=0, heads_axis=1), state


@functools.partial(jax.jit, donate_argnames="state")
def release(state: State, ended_B: Array) -> State:
    """Ends the completions of some slots where they are."""
    return dataclasses.replace(state, live_B=state.live_B & ~ended_B)
