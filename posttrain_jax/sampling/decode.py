"""What the engine runs on the device: prompts into slots (`admit`, `share`), and tokens for all slots (`decode`).

A slot is a row of the cache with the state of the answer that is being written in it. The functions take the slots
and give them back with the same buffers (donated). The cache is one pair of arrays a layer, written in place; every
row's tokens lie at its places 0, 1, 2 ..., so an answer is the same in every slot, and a prompt stays readable in its
slot until the next one comes.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from posttrain_jax.models import kv_cache
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import Needs, SamplingRows, ban_words, choose, penalise, sample_keys
from posttrain_jax.sharding import BATCH_AXES, ambient_mesh
from posttrain_jax.types import Array, PyTree


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
class Slots:
    """The state of B slots with S places in the cache each and room for N new tokens.

    Attributes:
      cache: see `kv_cache.init_cache`.
      hidden_BD: the hidden state of the prompt's last token, from which an answer's first token is drawn.
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

    cache: PyTree
    hidden_BD: Array
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


@functools.partial(jax.jit, static_argnames=("model", "rows", "places", "new_tokens", "needs", "stop_width"))
def empty_slots(
    *, model: Model, rows: int, places: int, new_tokens: int, needs: Needs, stop_width: int
) -> Slots:
    """Slots with nothing in them."""
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
    slots = Slots(
        cache=kv_cache.init_cache(model.config, rows, places, model.dtype),
        hidden_BD=zeros(model.config.d_model, dtype=model.dtype),
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
    return _constrain(slots, model)


def _constrain(slots: Slots, model: Model) -> Slots:
    """Rows over data and fsdp, key heads over tensor where they divide."""
    mesh = ambient_mesh()
    if mesh is None:
        return slots
    heads = "tensor" if model.config.n_kv_heads % mesh.shape["tensor"] == 0 else None
    heads_spec = P(BATCH_AXES, heads)
    layers = jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, heads_spec), slots.cache["layers"]
    )
    return dataclasses.replace(slots, cache={**slots.cache, "layers": layers})


@functools.partial(jax.jit, static_argnames=("model", "needs"), donate_argnames="slots")
def admit(
    params: PyTree,
    slots: Slots,
    tokens_PT: Array,
    lengths_P: Array,
    source_R: Array,
    slot_R: Array,
    orders_R: Orders,
    *,
    model: Model,
    needs: Needs,
) -> Slots:
    """Reads P prompts once each, puts them into R slots and draws each answer's first token.

    Args:
      params: stacked layers, as they are trained.
      tokens_PT, lengths_P: prompts, padded on the right.
      source_R: which of the prompts goes into the slot (samples of one prompt share it).
      slot_R: which slot; one out of range = nowhere, so that R can be padded.
      orders_R: how they are answered.
    """
    real_PT = (jnp.arange(tokens_PT.shape[1])[None] < lengths_P[:, None]).astype(jnp.int32)
    output = model.apply(params, tokens_PT, segment_ids_BT=real_PT, keep_kv=True, logits=False)
    last_P11 = jnp.maximum(lengths_P - 1, 0)[:, None, None]
    hidden_PD = jnp.take_along_axis(output.hidden_BTD, last_P11, axis=1)[:, 0]
    layers = [
        kv_cache.put_rows(
            layer, output.cache["k"][number][source_R], output.cache["v"][number][source_R], slot_R
        )
        for number, layer in enumerate(slots.cache["layers"])
    ]
    prompt_BV = slots.prompt_BV
    if needs.penalties:
        prompt_RT = jnp.where(real_PT == 1, tokens_PT, model.config.vocab_size)[source_R]
        rows_R1 = jnp.arange(slot_R.shape[0])[:, None]
        seen_RV = jnp.zeros((slot_R.shape[0], model.config.vocab_size), bool)
        seen_RV = seen_RV.at[rows_R1, prompt_RT].set(True, mode="drop")
        prompt_BV = prompt_BV.at[slot_R].set(seen_RV, mode="drop")
    slots = dataclasses.replace(
        slots,
        cache={**slots.cache, "layers": layers},
        hidden_BD=slots.hidden_BD.at[slot_R].set(hidden_PD[source_R], mode="drop"),
        prompt_BV=prompt_BV,
    )
    logits_RV = model.logits(params, hidden_PD)[source_R]
    return _constrain(_start(slots, slot_R, lengths_P[source_R], orders_R, logits_RV, needs), model)


@functools.partial(jax.jit, static_argnames=("model", "needs"), donate_argnames="slots")
def share(
    params: PyTree,
    slots: Slots,
    source_R: Array,
    length_R: Array,
    slot_R: Array,
    orders_R: Orders,
    *,
    model: Model,
    needs: Needs,
) -> Slots:
    """As `admit`, of prompts that other slots hold already, so that nothing is read.

    Args:
      params: for the vocabulary projection.
      source_R: which slot holds the prompt; whatever it holds behind it is not used.
      length_R: the prompt's tokens.
      slot_R, orders_R: see `admit`.
    """

    def copy(values: Array) -> Array:
        return values.at[slot_R].set(values[source_R], mode="drop")

    logits_RV = model.logits(params, slots.hidden_BD[source_R])
    slots = dataclasses.replace(
        slots,
        cache={**slots.cache, "layers": jax.tree.map(copy, slots.cache["layers"])},
        hidden_BD=copy(slots.hidden_BD),
        prompt_BV=copy(slots.prompt_BV),
    )
    return _constrain(_start(slots, slot_R, length_R, orders_R, logits_RV, needs), model)


def _start(
    slots: Slots, slot_R: Array, length_R: Array, orders_R: Orders, logits_RV: Array, needs: Needs
) -> Slots:
    """Draws the first token of the answers to R prompts that the slots hold."""
    rows, places = slots.cache["positions"].shape

    def put(old_B: Array, new_R: Array) -> Array:
        return old_B.at[slot_R].set(new_R.astype(old_B.dtype), mode="drop")

    place_1S = jnp.arange(places, dtype=jnp.int32)[None]
    cache = {
        **slots.cache,
        "positions": put(slots.cache["positions"], jnp.where(place_1S < length_R[:, None], place_1S, -1)),
        "length": put(slots.cache["length"], length_R),
    }
    key_R = jax.vmap(lambda ids: sample_keys(ids[0], ids[1:2], ids[2:3])[0])(orders_R.ids_B3)
    zero_R = jnp.zeros(slot_R.shape, jnp.int32)
    slots = dataclasses.replace(
        slots,
        cache=cache,
        orders=jax.tree.map(put, slots.orders, orders_R),
        keys_B=slots.keys_B.at[slot_R].set(key_R, mode="drop"),
        count_B=put(slots.count_B, zero_R),
        stopped_B=put(slots.stopped_B, zero_R),
        counts_BV=slots.counts_BV.at[slot_R].set(0, mode="drop"),
        recent_BW=put(slots.recent_BW, orders_R.prompt_end_BW),
    )
    logits_BV = jnp.zeros((rows, logits_RV.shape[1]), jnp.float32).at[slot_R].set(logits_RV, mode="drop")
    new_B = jnp.zeros(rows, bool).at[slot_R].set(True, mode="drop")
    return _record(slots, logits_BV, new_B, needs, keep=slots.live_B)


def _record(slots: Slots, logits_BV: Array, active_B: Array, needs: Needs, keep: Array) -> Slots:
    """Draws a token for every active row and writes it down; `keep` says which other rows stay live."""
    orders = slots.orders
    allowed_BV = logits_BV
    rows_B1 = jnp.arange(active_B.shape[0])[:, None]
    if needs.penalties:
        allowed_BV = penalise(allowed_BV, slots.prompt_BV, slots.counts_BV, orders.sampling)
    if needs.bad_words:
        allowed_BV = ban_words(allowed_BV, slots.recent_BW, needs.bad_words)
    if needs.min_tokens:
        early_B1 = (slots.count_B < orders.min_tokens_B)[:, None] & (orders.stop_BW >= 0)
        banned_BW = jnp.where(early_B1, orders.stop_BW, allowed_BV.shape[1])
        allowed_BV = allowed_BV.at[rows_B1, banned_BW].set(-jnp.inf, mode="drop")
    choice = choose(logits_BV, allowed_BV, slots.keys_B, slots.count_B, orders.sampling, needs)
    token_B = jnp.where(active_B, choice.token_B, slots.token_B)
    place_B = jnp.where(active_B, slots.count_B, slots.tokens_BN.shape[1])

    def write(old_BN: Array, new_B: Array) -> Array:
        return old_BN.at[rows_B1[:, 0], place_B].set(new_B, mode="drop")

    stopped_B = active_B & jnp.any(token_B[:, None] == orders.stop_BW, axis=1)
    count_B = slots.count_B + active_B
    counts_BV, recent_BW = slots.counts_BV, slots.recent_BW
    if needs.penalties:
        counts_BV = counts_BV.at[rows_B1[:, 0], token_B].add(active_B.astype(jnp.int32))
    if needs.bad_words and recent_BW.shape[1]:
        moved_BW = jnp.concatenate([recent_BW[:, 1:], token_B[:, None]], axis=1)
        recent_BW = jnp.where(active_B[:, None], moved_BW, recent_BW)
    return dataclasses.replace(
        slots,
        token_B=token_B,
        count_B=count_B,
        live_B=jnp.where(active_B, ~stopped_B & (count_B < orders.limit_B), keep),
        stopped_B=slots.stopped_B | stopped_B,
        tokens_BN=write(slots.tokens_BN, token_B),
        logps_BN=write(slots.logps_BN, choice.logp_B),
        sample_logps_BN=write(slots.sample_logps_BN, choice.sample_logp_B),
        alternatives_BNK=write(slots.alternatives_BNK, choice.alternatives_BK),
        alternative_logps_BNK=write(slots.alternative_logps_BNK, choice.alternative_logps_BK),
        counts_BV=counts_BV,
        recent_BW=recent_BW,
    )


@functools.partial(jax.jit, static_argnames=("model", "needs"), donate_argnames="slots")
def decode(
    params: PyTree, slots: Slots, steps: Array, until_finished: Array, *, model: Model, needs: Needs
) -> Slots:
    """Up to `steps` tokens for every live slot, in one loop on the device.

    It ends early when no slot is live, and with `until_finished` as soon as a slot's answer ends, so that its
    slot can be given to the next prompt. `params` may hold `transformer.decode_layers`.
    """
    before = jnp.sum(slots.live_B)

    def go_on(carry: tuple[Array, Slots]) -> Array:
        step, slots = carry
        live = jnp.sum(slots.live_B)
        return (step < steps) & (live > 0) & ~(until_finished & (live < before))

    def one_token(carry: tuple[Array, Slots]) -> tuple[Array, Slots]:
        step, slots = carry
        live_B = slots.live_B
        output = model.apply(
            params,
            slots.token_B[:, None],
            segment_ids_BT=live_B.astype(jnp.int32)[:, None],
            cache=slots.cache,
            logits=False,
        )
        logits_BV = model.logits(params, output.hidden_BTD[:, 0])
        slots = dataclasses.replace(slots, cache=output.cache)
        return step + 1, _record(slots, logits_BV, live_B, needs, keep=live_B)

    return _constrain(jax.lax.while_loop(go_on, one_token, (jnp.int32(0), slots))[1], model)


@functools.partial(jax.jit, static_argnames=("model", "places"))
def resize(slots: Slots, *, model: Model, places: int) -> Slots:
    """The same slots with more places in the cache (or fewer, if no more are taken)."""
    cache = kv_cache.resize(slots.cache, model.config, places)
    return _constrain(dataclasses.replace(slots, cache=cache), model)


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, ended_B: Array) -> Slots:
    """Ends the answers of some slots where they are."""
    return dataclasses.replace(slots, live_B=slots.live_B & ~ended_B)
