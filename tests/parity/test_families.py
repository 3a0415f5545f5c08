"""Every family gives `transformers`' logits: whole, padded, packed, through the KV cache, and after an export."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")

from transformers import AutoModelForCausalLM

from parity.torch_families import FAMILIES, make_config, make_model
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.io.load import LoadedModel, load_model
from posttrain_jax.models.kv_cache import init_cache
from posttrain_jax.models.transformer import make_model as make_ours

LENGTH = 24  # longer than every sliding window in FAMILIES


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same model on both sides, and rows of tokens."""

    reference: torch.nn.Module
    ours: LoadedModel
    folder: pathlib.Path
    tokens_BT: np.ndarray

    def reference_logits(self, tokens_BT: np.ndarray, mask_BT: np.ndarray | None = None) -> np.ndarray:
        with torch.no_grad():
            mask = None if mask_BT is None else torch.tensor(mask_BT)
            return self.reference(torch.tensor(tokens_BT), attention_mask=mask).logits.numpy()

    def our_logits(
        self, tokens_BT: np.ndarray, segments_BT: np.ndarray, positions_BT: np.ndarray
    ) -> np.ndarray:
        apply = jax.jit(lambda p, t, s, q: self.ours.apply(p, t, segment_ids_BT=s, positions_BT=q).logits_BTV)
        return np.asarray(apply(self.ours.params, tokens_BT, segments_BT, positions_BT))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    reference = make_model(make_config(request.param), folder)
    tokens_BT = np.random.default_rng(0).integers(3, 96, (2, LENGTH)).astype(np.int32)
    return Pair(reference, load_model(str(folder)), folder, tokens_BT)


def assert_close(ours: np.ndarray, reference: np.ndarray) -> None:
    """1e-4 relative to the largest logit."""
    assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()


def row_positions(batch: int) -> np.ndarray:
    return np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (batch, LENGTH))


def test_logits(pair: Pair) -> None:
    reference = pair.reference_logits(pair.tokens_BT)
    ones = np.ones_like(pair.tokens_BT)
    assert_close(pair.our_logits(pair.tokens_BT, ones, row_positions(2)), reference)
    # the logits must depend on the whole context, or the tests below prove nothing
    other = pair.reference_logits(np.roll(pair.tokens_BT, 1, axis=0)[:, :4])
    assert np.abs(other - reference[:, :4]).max() > 1e-2 * np.abs(reference).max()


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(pair: Pair, side: str) -> None:
    """Row 0 has 15 real tokens and row 1 all; ours marks padding by segment 0."""
    real = 15
    mask_BT = np.ones((2, LENGTH), np.int32)
    mask_BT[0, slice(real, None) if side == "right" else slice(0, LENGTH - real)] = 0
    tokens_BT = np.where(mask_BT == 1, pair.tokens_BT, 0)
    positions_BT = np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0).astype(np.int32)
    with torch.no_grad():
        reference = pair.reference(
            torch.tensor(tokens_BT),
            attention_mask=torch.tensor(mask_BT),
            position_ids=torch.tensor(positions_BT),
        ).logits.numpy()
    ours = pair.our_logits(tokens_BT, mask_BT, positions_BT)
    assert_close(ours[mask_BT == 1], reference[mask_BT == 1])


def test_packed_rows_equal_separate_rows(pair: Pair) -> None:
    """Three sequences of 9, 12 and 2 tokens and one place of padding in one row, against each on its own."""
    lengths = (9, 12, 2)
    row = pair.tokens_BT[0].copy()
    segments = np.zeros(LENGTH, np.int32)
    positions = np.zeros(LENGTH, np.int32)
    start = 0
    for number, length in enumerate(lengths, 1):
        segments[start : start + length] = number
        positions[start : start + length] = np.arange(length)
        start += length
    rows = [
        np.stack([a, b])
        for a, b in ((row, pair.tokens_BT[1]), (segments, np.ones(LENGTH)), (positions, np.arange(LENGTH)))
    ]
    ours = pair.our_logits(rows[0], rows[1].astype(np.int32), rows[2].astype(np.int32))
    start = 0
    for length in lengths:
        alone = pair.reference_logits(row[None, start : start + length])
        assert_close(ours[:1, start : start + length], alone)
        start += length


def test_through_the_cache(pair: Pair) -> None:
    """Prefill of ragged rows (right-padded), then one token at a time past the sliding window."""
    prompt_B, prefill = np.array([6, 10]), 10
    segments_BT = (np.arange(prefill)[None, :] < prompt_B[:, None]).astype(np.int32)
    model, params = pair.ours.model, pair.ours.params
    cache = init_cache(pair.ours.config, 2, LENGTH)
    step = jax.jit(lambda p, t, s, c: model.apply(p, t, segment_ids_BT=s, cache=c))
    out = step(params, pair.tokens_BT[:, :prefill], segments_BT, cache)
    reference = pair.reference_logits(pair.tokens_BT)
    for row, length in enumerate(prompt_B):
        assert_close(np.asarray(out.logits_BTV)[row, :length], reference[row, :length])
    for number in range(LENGTH - prefill):
        at_B = prompt_B + number
        tokens_B1 = np.take_along_axis(pair.tokens_BT, at_B[:, None], axis=1)
        out = step(params, tokens_B1, jnp.ones((2, 1), jnp.int32), out.cache)
        assert_close(np.asarray(out.logits_BTV)[:, 0], reference[np.arange(2), at_B])


def test_export_import_is_bit_exact_and_loads_in_transformers(pair: Pair, tmp_path: pathlib.Path) -> None:
    ours = pair.ours
    for name, original in (("kept", ours.original), ("fresh", None)):
        folder = tmp_path / name
        export_hf(
            folder,
            config=ours.config,
            params=ours.params,
            tokenizer=None,
            original=original,
            max_shard_bytes=40_000,
        )
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        again = load_model(str(folder))
        assert again.config == ours.config
        jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        assert theirs.dtype == torch.float32
        with torch.no_grad():
            logits = theirs(torch.tensor(pair.tokens_BT)).logits.numpy()
        np.testing.assert_array_equal(logits, pair.reference_logits(pair.tokens_BT))


def wrong_numbers(config: ModelConfig) -> list[ModelConfig]:
    """The config with one number off, for every number that a family may have got wrong."""
    change = dataclasses.replace
    rope = change(config.rope, theta=config.rope.theta * 2)
    out = [change(config, rope=rope, rope_local=rope), change(config, query_scale=config.query_scale * 0.8)]
    out.append(change(config, norm_eps=config.norm_eps + 0.05))
    if config.rope.scaling != "none":
        unscaled = change(config.rope, scaling="none")
        out.append(change(config, rope=unscaled, rope_local=unscaled))
    if config.rope.scaling == "llama3":
        out.append(change(config, rope=change(config.rope, high_freq_factor=2.0)))
    if config.any_local:
        out.append(change(config, sliding_window=config.sliding_window + 1))
        out.append(change(config, local_layers=config.local_layers[1:] + config.local_layers[:1]))
    if config.any_local and config.any_global and config.rope != config.rope_local:
        out.append(change(config, rope=config.rope_local, rope_local=config.rope))
    if config.attn_softcap:
        out.append(change(config, attn_softcap=config.attn_softcap * 1.1))
    if config.logits_softcap:
        out.append(change(config, logits_softcap=config.logits_softcap * 1.1))
    if config.embed_scale != 1:
        out.append(change(config, embed_scale=1.0))
    return [wrong for wrong in out if wrong != config]


def test_a_wrong_number_shows(pair: Pair) -> None:
    """The tests above can fail: each number of the config moves the logits by ten times their tolerance."""
    reference = pair.reference_logits(pair.tokens_BT[:1])
    for wrong in wrong_numbers(pair.ours.config):
        logits = np.asarray(make_ours(wrong).apply(pair.ours.params, pair.tokens_BT[:1]).logits_BTV)
        assert np.abs(logits - reference).max() > 1e-3 * np.abs(reference).max(), wrong
