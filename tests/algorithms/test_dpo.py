"""DPO's step: completions after a shared prompt are those after a prompt of their own, and the loss starts at log 2."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.tiny import make_mesh
from ml_collections import ConfigDict
from tasks import experiment_of, spec_of, task_of

from algorithms import tiny
from algorithms.tiny import assert_same, batch_of, ranked_data, tiny_model, tiny_params
from configs.dpo.smollm2_135m import get_config
from posttrain_jax.algorithms import dpo
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import put_batch
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import PreferenceBatch
from posttrain_jax.core.updates import used_micro_batches
from posttrain_jax.data.preference_groups import PreferenceData
from posttrain_jax.data.preference_rows import PreferenceRows, row_shape
from posttrain_jax.data.tokenized import TokenizeOptions
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.forward.completions import policy_logps
from posttrain_jax.forward.reference_cache import reference_logps
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer

NUMBERS = {"label_smoothing": 0.1, "gamma": 50.0, "alpha": 0.2}  # gamma: so that no hinge is at rest
OPTIONS = dpo.Options()


def options_of(loss: str, **changes: float) -> dpo.Options:
    """The loss with the numbers that it looks at."""
    numbers = {**NUMBERS, **changes}
    return dpo.Options(
        loss=loss, **{name: value for name, value in numbers.items() if loss in dpo.USED_BY[name]}
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreferenceData:
    return ranked_data(tmp_path_factory.mktemp("pairs"))


def mean_gradient(family: str, batch, mesh, *, share: bool, attention: str = "xla", options=OPTIONS):
    model = tiny_model(family, attention)

    def loss_sum(params, micro):
        zeros_BN = jnp.zeros(micro.last_token_index.shape, jnp.float32)
        return dpo.pair_losses(params, micro, zeros_BN, model=model, options=options, share_prompt=share)

    return tiny.mean_gradient(loss_sum, tiny_params(family), batch, mesh)


@pytest.mark.parametrize(
    ("family", "attention", "length"), [("llama", "xla", 0), ("gemma", "xla", 0), ("gemma", "blocks", 512)]
)
def test_a_shared_prompt_gives_the_same_loss_and_gradient(data, family, attention, length):
    """The Gemma model has soft caps and layers whose window (6 tokens) ends within the prompt."""
    mesh = make_mesh(1, 1, 1)
    plain = batch_of(data, mesh, share=False, micro_batches=1)
    want = mean_gradient(family, plain, mesh, share=False)
    shared = batch_of(data, mesh, share=True, micro_batches=1, length=length)
    assert int(jnp.sum(shared.segment_ids != 0)) < int(jnp.sum(plain.segment_ids != 0))
    assert_same(mean_gradient(family, shared, mesh, share=True, attention=attention), want)


@pytest.mark.parametrize(("mesh", "cuts"), [((1, 1, 1), 8), ((1, 1, 1), 2), ((4, 1, 1), 2), ((1, 2, 2), 4)])
def test_micro_batches_and_meshes_do_not_change_it(data, mesh, cuts):
    """Eight groups fill fewer than eight rows; the micro-batches that stay empty are left out."""
    one = make_mesh(1, 1, 1)
    want = mean_gradient(
        "llama", batch_of(data, one, share=True, micro_batches=1, length=128), one, share=True
    )
    many = make_mesh(*mesh)
    batch = batch_of(data, many, share=True, micro_batches=cuts, length=128)
    if cuts == 8:
        assert int(used_micro_batches(batch.segment_ids)) < 8
    assert_same(mean_gradient("llama", batch, many, share=True), want)


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_every_loss_prefers_the_better_completion(data, loss):
    """Its gradient raises the better and lowers the worse; empty places have none. (DPOP's penalty is not met: the
    better one is likelier than under the reference.)"""
    mesh = make_mesh(1, 1, 1)
    rows = jax.tree.map(lambda leaf: leaf[0], batch_of(data, mesh, share=True, micro_batches=1))
    # A hinge that is met has no gradient, so SLiC's margin must be larger than any difference here.
    options = options_of(loss, gamma=1000.0 if loss == "slic" else 50.0)
    present_BN = rows.sequence_ids != 0
    reference_BN = jnp.where(present_BN, -20.0, 0.0)
    logps_BN2 = jnp.stack([reference_BN + 1.0, jnp.full_like(reference_BN, -0.5)], axis=-1)

    def total(logps_BN2):
        pairs = dpo.gather_pairs(logps_BN2, rows, reference_BN, options)
        return jnp.sum(dpo.LOSSES[loss](pairs, options).loss)

    value, gradient = jax.value_and_grad(total)(logps_BN2)
    assert np.isfinite(float(value))
    gradient_BN = np.asarray(gradient[..., 0])
    assert not gradient_BN[~np.asarray(present_BN)].any()
    compared = np.asarray(rows.weights) != 0
    groups = np.asarray(rows.group_ids)
    for r in range(len(groups)):
        for number in range(1, groups[r].max() + 1):
            slots = np.flatnonzero(groups[r] == number)
            assert gradient_BN[r, slots[-1]] < 0 < gradient_BN[r, slots[0]]  # the last has the highest score
    assert compared.sum() == sum(n * (n - 1) // 2 for n in (2, 3, 4, 2, 3, 4, 2))


def test_the_end_of_turn_can_be_left_out_and_the_likelihood_kept(data):
    """skip_eos compares sums less the last token's; the mean negative log-likelihood of the better one is added."""
    mesh = make_mesh(1, 1, 1)
    batch = batch_of(data, mesh, share=True, micro_batches=1)
    ends = dpo.end_token_ids(byte_tokenizer())
    options = dataclasses.replace(OPTIONS, nll_weight=0.2, skip_eos=True, end_ids=ends)
    value, gradients, count = mean_gradient("llama", batch, mesh, share=True, options=options)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    score = jax.jit(functools.partial(policy_logps, model=tiny_model("llama"), share_prompt=True))
    logps = np.asarray(score(tiny_params("llama"), rows))
    want = []
    for r, p in zip(*np.nonzero(np.asarray(rows.weights)), strict=True):
        w, x = int(rows.better[r, p]), int(rows.worse[r, p])
        h = (logps[r, w, 0] - logps[r, w, 1]) - (logps[r, x, 0] - logps[r, x, 1])
        want.append(np.log1p(np.exp(-0.1 * h)) - 0.2 * logps[r, w, 0] / int(rows.lengths[r, w]))
    assert float(count) == len(want)
    np.testing.assert_allclose(float(value), np.mean(want), rtol=1e-5)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradients))


def test_a_completion_that_was_cut_keeps_its_last_token(tmp_path):
    """Both completions have 3 tokens and their end; the longer prompt leaves room for the 3 alone. In memory and from
    the cache the same is left out."""
    rows = [{"prompt": prompt, "chosen": "abc", "rejected": "xyz"} for prompt in ("1", "22")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer()
    whole = len(tokenizer("1")["input_ids"]) + 4
    cut = build_preferences(
        str(tmp_path / "rows.jsonl"), tokenizer, TokenizeOptions(max_length=whole), cache_dir=tmp_path
    )
    options = dataclasses.replace(OPTIONS, skip_eos=True, end_ids=dpo.end_token_ids(tokenizer))
    np.testing.assert_array_equal(dpo._skipped_of_store(cut.sources[0], options), [1, 1, 0, 0])
    batch = batch_of(cut, make_mesh(1, 1, 1), share=True, micro_batches=1, rows=2)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    skipped_BN, ids_BN = np.asarray(dpo._skipped(rows, options)), np.asarray(rows.sequence_ids)
    assert [float(skipped_BN[ids_BN == number].item()) for number in (1, 2, 3, 4)] == [1, 1, 0, 0]
    logps_BN2 = jnp.stack([jnp.full(ids_BN.shape, -5.0), jnp.full(ids_BN.shape, -2.0)], axis=-1)
    pairs = dpo.gather_pairs(logps_BN2, rows, jnp.zeros(ids_BN.shape), options)
    weights_BP = np.asarray(rows.weights) != 0
    for values_BP, want in ((pairs.chosen, [-5, -3]), (pairs.chosen_lengths, [3, 3])):
        assert sorted(np.asarray(values_BP)[weights_BP].tolist()) == want


def test_the_log_probability_is_that_of_the_sequence_alone(data):
    """Each completion after its own prompt, one row a sequence, through whole logits."""
    mesh = make_mesh(1, 1, 1)
    model, params = tiny_model("gemma"), tiny_params("gemma")
    batch = batch_of(data, mesh, share=True, micro_batches=1)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    score = jax.jit(functools.partial(policy_logps, model=model, share_prompt=True))
    logps_BN2 = np.asarray(score(params, rows))
    whole = jax.jit(lambda params, tokens: jax.nn.log_softmax(model.apply(params, tokens).logits_BTV))
    ids = np.asarray(rows.sequence_ids)
    store = data.sources[0].store
    length = int(np.diff(store.offsets).max())
    for r, slot in zip(*np.nonzero(ids), strict=True):
        at = slice(store.offsets[ids[r, slot] - 1], store.offsets[ids[r, slot]])
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : at.stop - at.start] = store.tokens[at]
        logps = np.asarray(whole(params, tokens))[0]
        each = logps[np.arange(length - 1), tokens[0, 1:]]
        want = each[np.flatnonzero(store.loss_mask[at]) - 1]
        np.testing.assert_allclose(logps_BN2[r, slot], [want.sum(), want[-1]], rtol=2e-5, atol=2e-5)


def test_the_first_loss_is_log_2(data, tmp_path):
    """Cached reference log-probabilities are those of the policy at step 0: -log s(0) = log 2, to 1e-6."""
    mesh = make_mesh(1, 1, 1)
    model, params = tiny_model("llama"), tiny_params("llama")
    shape = row_shape([data], groups=4, length=256)
    (known,) = reference_logps(
        model, params, data.sources, shape, mesh, groups=4, micro_batches=2, workdir=tmp_path, folder=tmp_path
    )
    source = PreferenceRows(data.sources[0], shape, known[:, 0])
    batch = put_batch(source.collate([source[i] for i in range(4)]), mesh, 1, PreferenceBatch)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    compute = jax.jit(functools.partial(dpo.pair_losses, model=model, options=OPTIONS, share_prompt=True))
    total, metrics = compute(params, rows, rows.reference_logps)
    assert abs(float(total) / float(metrics["loss"].count) - np.log(2)) < 1e-6
    assert abs(float(metrics["rewards/margins"].sum)) < 1e-4


def config_of(**dpo_keys) -> ConfigDict:
    config = get_config("tiny")
    config.mesh.data = config.train.rows_per_step = config.eval.batch_rows = 8
    for name, value in dpo_keys.items():
        config.dpo[name] = value
    return config


@pytest.mark.parametrize("reference", ["cached", "memory"])
def test_in_bfloat16_the_first_step_begins_at_the_reference(reference, tmp_path, monkeypatch):
    """The train step's log-probabilities are those of the reference, bit for bit: every comparison is a tie (0 right),
    and the loss is log 2 (0.69312 with what XLA may leave out of a train step's roundings)."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    config = config_of(reference=reference)
    config.model.dtype, config.data.eval = "bfloat16", ""
    task = task_of(config, tmp_path)
    state = task.init_state()
    _, metrics = task.train_step(state, task.collector.next(state).batch)
    task.collector.close()
    assert float(metrics["train/loss"].sum / metrics["train/loss"].count) == pytest.approx(
        np.log(2), abs=1e-7
    )
    for name in ("accuracies", "margins", "chosen", "rejected"):
        assert float(metrics[f"train/rewards/{name}"].sum) == 0.0


def test_in_bfloat16_ties_are_ties_wherever_a_completion_stands(tmp_path, monkeypatch):
    """Pairs of 3 to 60 tokens, several in a row of 512, whose cached reference was computed longest first: in the rows
    of the first step it is another one by rounding, which is none. The evaluation's rows are the reference's own."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    texts = [chr(97 + n) * (3 + 7 * n % 58) for n in range(24)]
    pairs = [{"prompt": "Q", "chosen": text, "rejected": text[::-1] + "!"} for text in texts]
    for name, part in (("train", pairs[:16]), ("held", pairs[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    config = config_of()
    config.data.train, config.data.eval = str(tmp_path / "train.jsonl"), str(tmp_path / "held.jsonl")
    config.data.row_length, config.model.dtype = 512, "bfloat16"
    config.mesh.data, config.train.micro_rows = 1, 8
    task = task_of(config, tmp_path)
    state = task.init_state()
    held_out = task.evaluate(state)
    batch = task.collector.next(state).batch
    task.collector.close()
    policy = spec_of(config)
    params = combine(state.params, state.frozen)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    logps = jax.jit(functools.partial(policy_logps, model=policy.model, share_prompt=True))(params, rows)
    apart = np.abs(logps[..., 0] - rows.reference_logps)[np.asarray(rows.sequence_ids) != 0]
    assert 0 < apart.max() < 1.0
    _, metrics = task.train_step(state, batch)
    for name, value in (("loss", np.log(2)), ("rewards/accuracies", 0.0), ("rewards/margins", 0.0)):
        metric = metrics[f"train/{name}"]
        assert float(metric.sum / metric.count) == pytest.approx(value, abs=1e-7)
    assert held_out["eval/loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert held_out["eval/reward_accuracy"] == held_out["eval/rewards/margins"] == 0.0
    assert "eval/rewards/accuracies" not in held_out  # once is enough


def test_a_wrong_reference_is_not_taken_for_rounding(data):
    """5 nats off in float32 there are margins; 1e-5 nats off there are none, in the first step and in evaluations."""
    mesh = make_mesh(1, 1, 1)
    model, params = tiny_model("llama"), tiny_params("llama")
    rows = jax.tree.map(lambda leaf: leaf[0], batch_of(data, mesh, share=True, micro_batches=1))
    logps_BN = jax.jit(functools.partial(policy_logps, model=model, share_prompt=True))(params, rows)[..., 0]
    better_BN = jnp.zeros(logps_BN.shape).at[jnp.arange(len(logps_BN))[:, None], rows.better].set(1.0)
    compute = jax.jit(functools.partial(dpo.pair_losses, model=model, options=OPTIONS, share_prompt=True))
    margins = []
    for off, is_first in ((5.0, True), (1e-5, True), (1e-5, False)):
        _, metrics = compute(params, rows, logps_BN + off * better_BN, is_first_step=jnp.bool_(is_first))
        margins.append(float(metrics["rewards/margins"].sum / metrics["rewards/margins"].count))
    assert margins[0] < -0.01 and margins[1:] == [0.0, 0.0]


@pytest.mark.parametrize("reference", ["cached", "memory", "adapter"])
def test_a_loss_without_a_reference_computes_none(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    task_of(config_of(loss="orpo", alpha=0.1, reference=reference), tmp_path / "run").collector.close()
    assert "computed once" not in capsys.readouterr().out
    assert not (tmp_path / "cache" / "reference_logps").exists()


def test_a_reference_in_memory_is_part_of_the_data(tmp_path, monkeypatch):
    """A run does not go on against another model than it began with; here the seed draws the model."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    found = []
    for seed in (1, 1, 2):
        config = config_of(reference="memory")
        config.seed, config.data.eval = seed, ""
        collector = task_of(config, tmp_path / "run").collector
        found.append(str(collector.get_state()))
        collector.close()
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eta": 2.0}, "dpo.eta is 2, and dpo.loss=dpo does not look at it; these do: rpo"),
        ({"loss": "rpo", "eta": 0.0}, "dpo.loss=rpo needs dpo.eta"),
        ({"loss": "orpo", "alpha": 0.1, "beta": 0.2}, "dpo.beta is 0.2, and dpo.loss=orpo does not look"),
        ({"loss": "slic", "alpha": 0.1, "gamma": 1.0, "beta": 0.2}, "dpo.loss=slic does not look at it"),
    ],
)
def test_numbers_that_the_loss_ignores_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        experiment_of(config_of(**keys))


def test_the_reference_is_computed_once(data, tmp_path, capsys, caplog):
    """A second run reads the file; other parameters make another one; a run whose cache is lost has its own."""
    mesh = make_mesh(1, 1, 1)
    model, params = tiny_model("llama"), tiny_params("llama")
    shape = row_shape([data], groups=4)
    cache = tmp_path / "cache"

    def ask(params, run):
        return reference_logps(
            model,
            params,
            data.sources,
            shape,
            mesh,
            groups=4,
            micro_batches=1,
            workdir=tmp_path / run,
            folder=cache,
        )[0]

    first = ask(params, "first")
    assert "computed once" in capsys.readouterr().out
    np.testing.assert_array_equal(ask(params, "second"), first)
    assert "computed once" not in capsys.readouterr().out
    assert np.abs(ask(jax.tree.map(lambda leaf: 1.1 * leaf, params), "first") - first).max() > 1e-3
    assert len(list(cache.iterdir())) == 2
    capsys.readouterr()
    shutil.rmtree(cache)
    np.testing.assert_array_equal(ask(params, "second"), first)
    assert "computed once" not in capsys.readouterr().out
    ask(params, "third")
    assert "computed once" in capsys.readouterr().out
    # Of the right shape, and changed: not trusted, in the run's own copy and in the cache.
    for file in (*cache.iterdir(), *(tmp_path / "third").rglob("*.npz")):
        with np.load(file) as kept:
            np.savez(file, logps=np.full_like(kept["logps"], np.nan), sha256=kept["sha256"])
    np.testing.assert_array_equal(ask(params, "third"), first)
    assert caplog.text.count("are not as they were written; they are computed again") == 2
    with pytest.raises(
        InputError, match=r"log-probability of \d+ completions is no finite number, first of .*:1;"
    ):
        ask(jax.tree.map(lambda leaf: leaf * np.nan, params), "fourth")
