"""What the engine runs on the device: prompts are read (`read`), put into slots (`fill`, `copy_row`), begun on
(`begin`: the first token), and answered (`decode`: tokens for all slots).

A slot is a row of the cache, and of the state of the answer that is being written in it. The functions take these
and give them back with the same buffers (donated). The cache is one pair of arrays a layer, written in place; every
row's tokens lie at its places 0, 1, 2 ..., so an answer is the same in every slot, and a prompt stays readable in its
slot until the next one comes.

Few programs do all this, whatever the prompts: `read` has some lengths of chunks (`sampling/shapes.py`), `begin` as
many rows as there are slots, and only `decode`, with what moves a layer at a time, depends on the size of the cache.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.sharding import BATCH_AXES, ambient_mesh
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models import kv_cache
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import Needs, SamplingRows, ban_words, choose, penalize, sample_keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Orders:
    """How each of some rows is to be answered; every leaf starts with the row axis.

    Attributes:
      ids_B3: uint32, seed, prompt and sample: what the random numbers depend on.
      limit_B: int32, most new tokens.
      min_tokens_B: int32, no stop token before so many.
      stop_BW: int32 token ids that end the answer, -1 where there are fewer.
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
    """What B slots are at, beside their cache, with room for N new tokens each.

    Attributes:
      length_B: how many places of the cache are taken.
      orders: how each slot's prompt is to be answered.
      keys_B: typed PRNG keys, one a sample.
      token_B: the latest token, which the cache does not hold yet.
      count_B: how many tokens were drawn.
      live_B: whether there are more to draw.
      stopped_B: whether a stop token ended the answer.
      tokens_BN, logps_BN, sample_logps_BN: the answers so far; see `Choice`.
      alternatives_BNK, alternative_logps_BNK: see `Choice`.
      prompt_BV, counts_BV: tokens of the prompt and how often the answer holds each; V = 0 without penalties.
      recent_BW: the last tokens, for bad words; W = 0 without them.
    """

    length_B: Array
    orders: Orders
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
class Reading:
    """P prompts that are being read: see `kv_cache.init_reading`.

    Attributes:
      k_LPSGK, v_LPSGK: keys and values so far.
      hidden_PD: the hidden state of each prompt's last token, from which an answer's first token is drawn.
    """

    k_LPSGK: Array
    v_LPSGK: Array
    hidden_PD: Array


@functools.partial(jax.jit, static_argnames=("model", "rows", "new_tokens", "needs", "stop_width"))
def empty_state(*, model: Model, rows: int, new_tokens: int, needs: Needs, stop_width: int) -> State:
    """Of slots with nothing in them."""
    vocab = model.config.vocab_size if needs.penalties else 0
    width = needs.words_width

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
        orders=Orders(
            ids_B3=zeros(3, dtype="uint32"),
            limit_B=zeros(),
            min_tokens_B=zeros(),
            stop_BW=zeros(stop_width),
            prompt_end_BW=zeros(width),
            sampling=sampling,
        ),
        keys_B=sample_keys(0, zeros(), zeros()),
        token_B=zeros(),
        count_B=zeros(),
        live_B=zeros(dtype="bool"),
        stopped_B=zeros(dtype="bool"),
        tokens_BN=zeros(new_tokens),
        logps_BN=zeros(new_tokens, dtype="float32"),
        sample_logps_BN=zeros(new_tokens, dtype="float32"),
        alternatives_BNK=zeros(new_tokens, needs.alternatives),
        alternative_logps_BNK=zeros(new_tokens, needs.alternatives, dtype="float32"),
        prompt_BV=zeros(vocab, dtype="bool"),
        counts_BV=zeros(vocab),
        recent_BW=zeros(width),
    )


@functools.partial(jax.jit, static_argnames=("model", "rows", "places"))
def empty_layers(*, model: Model, rows: int, places: int) -> list[PyTree]:
    """A cache with nothing in it; see `kv_cache.init_layers`."""
    return _split(kv_cache.init_layers(model.config, rows, places, model.dtype), rows_axis=0, heads_axis=1)


@functools.partial(jax.jit, static_argnames=("model", "rows", "places"))
def empty_reading(*, model: Model, rows: int, places: int) -> Reading:
    """Room for so many prompts of so many tokens."""
    kv = kv_cache.init_reading(model.config, rows, places, model.dtype)
    kv = _split(kv, rows_axis=1, heads_axis=3)
    return Reading(kv["k"], kv["v"], jnp.zeros((rows, model.config.d_model), model.dtype))


def _split(arrays: PyTree, *, rows_axis: int, heads_axis: int) -> PyTree:
    """The arrays with their rows over data and fsdp, and their key heads over tensor where they divide."""
    mesh = ambient_mesh()
    if mesh is None:
        return arrays

    def one(leaf: Array) -> Array:
        axes: list[tuple[str, ...] | str | None] = [None] * leaf.ndim
        axes[rows_axis] = BATCH_AXES
        axes[heads_axis] = "tensor" if leaf.shape[heads_axis] % mesh.shape["tensor"] == 0 else None
        return jax.lax.with_sharding_constraint(leaf, P(*axes))

    return jax.tree.map(one, arrays)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="reading")
def read(
    params: PyTree, reading: Reading, tokens_PT: Array, start: Array, lengths_P: Array, *, model: Model
) -> Reading:
    """Reads the next T tokens of P prompts, those from the place `start` on.

    Args:
      params: stacked layers, as they are trained.
      reading: what was read of them before.
      tokens_PT: padded on the right where a prompt has fewer.
      start: int32 scalar, the same for all.
      lengths_P: tokens of the whole prompts.
    """
    kv = {"k": reading.k_LPSGK, "v": reading.v_LPSGK}
    hidden_PTD, kv = model.read(params, tokens_PT, start=start, reading=kv)
    kv = _split(kv, rows_axis=1, heads_axis=3)
    last_P, time = lengths_P - 1 - start, tokens_PT.shape[1]
    hidden_P1D = jnp.take_along_axis(hidden_PTD, jnp.clip(last_P, 0, time - 1)[:, None, None], axis=1)
    is_here_P1 = ((last_P >= 0) & (last_P < time))[:, None]
    return Reading(kv["k"], kv["v"], jnp.where(is_here_P1, hidden_P1D[:, 0], reading.hidden_PD))


# What moves prompts works on a layer at a time: one small program for all layers, where one for all of them together
# takes seconds to compile.


@functools.partial(jax.jit, donate_argnames="layer")
def fill(layer: PyTree, reading: Reading, number: Array, slot_P: Array) -> PyTree:
    """The cache's layer of this number, with the P prompts put into slots (one out of range = nowhere)."""
    places = layer["v"].shape[2]

    def of_layer(array_LPSGK: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(array_LPSGK, number, keepdims=False)[:, :places]

    layer = kv_cache.put_rows(layer, of_layer(reading.k_LPSGK), of_layer(reading.v_LPSGK), slot_P)
    return _split(layer, rows_axis=0, heads_axis=1)


@functools.partial(jax.jit, donate_argnames="layer")
def copy_row(layer: PyTree, source: Array, slot: Array) -> PyTree:
    """A layer of the cache in which a slot (out of range = none) holds what another one holds."""
    layer = jax.tree.map(lambda leaf: leaf.at[slot].set(leaf[source], mode="drop"), layer)
    return _split(layer, rows_axis=0, heads_axis=1)


@functools.partial(jax.jit, static_argnames="places")
def grow(layer: PyTree, *, places: int) -> PyTree:
    """A layer of the cache with more places."""
    return _split(kv_cache.grow(layer, places), rows_axis=0, heads_axis=1)


@functools.partial(jax.jit, static_argnames=("model", "needs"), donate_argnames="state")
def begin(
    params: PyTree,
    state: State,
    hidden_RD: Array,
    length_R: Array,
    prompt_RV: Array,
    slot_R: Array,
    orders_R: Orders,
    *,
    model: Model,
    needs: Needs,
) -> State:
    """Draws the first token of the answers to R prompts that the cache holds.

    Args:
      params: for the vocabulary projection.
      state: of the slots.
      hidden_RD: the hidden state of each prompt's last token.
      length_R: its tokens.
      prompt_RV: bool, which tokens it holds; V = 0 without penalties.
      slot_R: where it lies (out of range = nowhere, so that R can be padded).
      orders_R: how it is answered.
    """

    def put(old_B: Array, new_R: Array) -> Array:
        return old_B.at[slot_R].set(new_R.astype(old_B.dtype), mode="drop")

    rows = state.length_B.shape[0]
    key_R = jax.vmap(lambda ids: sample_keys(ids[0], ids[1:2], ids[2:3])[0])(orders_R.ids_B3)
    zero_R = jnp.zeros(slot_R.shape, jnp.int32)
    state = dataclasses.replace(
        state,
        length_B=put(state.length_B, length_R),
        orders=jax.tree.map(put, state.orders, orders_R),
        keys_B=state.keys_B.at[slot_R].set(key_R, mode="drop"),
        count_B=put(state.count_B, zero_R),
        stopped_B=put(state.stopped_B, zero_R),
        prompt_BV=put(state.prompt_BV, prompt_RV),
        counts_BV=state.counts_BV.at[slot_R].set(0, mode="drop"),
        recent_BW=put(state.recent_BW, orders_R.prompt_end_BW),
    )
    logits_RV = model.logits(params, hidden_RD)
    logits_BV = jnp.zeros((rows, logits_RV.shape[1]), jnp.float32).at[slot_R].set(logits_RV, mode="drop")
    new_B = jnp.zeros(rows, bool).at[slot_R].set(True, mode="drop")
    return _record(state, logits_BV, new_B, needs, keep=state.live_B)


def _record(state: State, logits_BV: Array, active_B: Array, needs: Needs, keep: Array) -> State:
    """Draws a token for every active row and writes it down; `keep` says which other rows stay live."""
    orders = state.orders
    allowed_BV = logits_BV
    rows_B1 = jnp.arange(active_B.shape[0])[:, None]
    if needs.penalties:
        allowed_BV = penalize(allowed_BV, state.prompt_BV, state.counts_BV, orders.sampling)
    if needs.bad_words:
        allowed_BV = ban_words(allowed_BV, state.recent_BW, needs.bad_words)
    if needs.min_tokens:
        early_B1 = (state.count_B < orders.min_tokens_B)[:, None] & (orders.stop_BW >= 0)
        banned_BW = jnp.where(early_B1, orders.stop_BW, allowed_BV.shape[1])
        allowed_BV = allowed_BV.at[rows_B1, banned_BW].set(-jnp.inf, mode="drop")
    choice = choose(logits_BV, allowed_BV, state.keys_B, state.count_B, orders.sampling, needs)
    token_B = jnp.where(active_B, choice.token_B, state.token_B)
    place_B = jnp.where(active_B, state.count_B, state.tokens_BN.shape[1])

    def write(old_BN: Array, new_B: Array) -> Array:
        return old_BN.at[rows_B1[:, 0], place_B].set(new_B, mode="drop")

    stopped_B = active_B & jnp.any(token_B[:, None] == orders.stop_BW, axis=1)
    count_B = state.count_B + active_B
    counts_BV, recent_BW = state.counts_BV, state.recent_BW
    if needs.penalties:
        counts_BV = counts_BV.at[rows_B1[:, 0], token_B].add(active_B.astype(jnp.int32))
    if needs.bad_words and recent_BW.shape[1]:
        moved_BW = jnp.concatenate([recent_BW[:, 1:], token_B[:, None]], axis=1)
        recent_BW = jnp.where(active_B[:, None], moved_BW, recent_BW)
    return dataclasses.replace(
        state,
        token_B=token_B,
        count_B=count_B,
        live_B=jnp.where(active_B, ~stopped_B & (count_B < orders.limit_B), keep),
        stopped_B=state.stopped_B | stopped_B,
        tokens_BN=write(state.tokens_BN, token_B),
        logps_BN=write(state.logps_BN, choice.logp_B),
        sample_logps_BN=write(state.sample_logps_BN, choice.sample_logp_B),
        alternatives_BNK=write(state.alternatives_BNK, choice.alternatives_BK),
        alternative_logps_BNK=write(state.alternative_logps_BNK, choice.alternative_logps_BK),
        counts_BV=counts_BV,
        recent_BW=recent_BW,
    )


@functools.partial(jax.jit, static_argnames=("model", "needs"), donate_argnames=("layers", "state"))
def decode(
    params: PyTree,
    layers: list[PyTree],
    state: State,
    steps: Array,
    until_finished: Array,
    *,
    model: Model,
    needs: Needs,
) -> tuple[list[PyTree], State]:
    """Up to `steps` tokens for every live slot, in one loop on the device.

    It ends early when no slot is live, and with `until_finished` as soon as a slot's answer ends, so that its
    slot can be given to the next prompt. `params` may hold `transformer.decode_layers`.
    """
    before = jnp.sum(state.live_B)
    place_1S = jnp.arange(layers[0]["v"].shape[2], dtype=jnp.int32)[None]
    positions_BS = jnp.where(place_1S < state.length_B[:, None], place_1S, -1)

    def go_on(carry: tuple[Array, list[PyTree], Array, State]) -> Array:
        step, _, _, state = carry
        live = jnp.sum(state.live_B)
        return (step < steps) & (live > 0) & ~(until_finished & (live < before))

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
        state = _record(state, model.logits(params, output.hidden_BTD[:, 0]), live_B, needs, keep=live_B)
        return step + 1, cache["layers"], cache["positions"], state

    carry = (jnp.int32(0), layers, positions_BS, state)
    _, layers, _, state = jax.lax.while_loop(go_on, one_token, carry)
    return _split(layers, rows_axis=0, heads_axis=1), state


@functools.partial(jax.jit, donate_argnames="state")
def release(state: State, ended_B: Array) -> State:
    """Ends the answers of some slots where they are."""
    return dataclasses.replace(state, live_B=state.live_B & ~ended_B)
