"""KTO: every prompt with its own completion and a mismatched one; z0 is the whole step's, however it is cut."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.tiny import make_mesh
from tasks import experiment_of, task_of

from algorithms.tiny import assert_same, tiny_model, tiny_params
from configs.dpo.smollm2_135m_kto import get_config
from posttrain_jax.algorithms import kto
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import jit_step, put_batch, replicated
from posttrain_jax.core.types import PreferenceBatch
from posttrain_jax.core.updates import gradient_sums, used_micro_batches
from posttrain_jax.data.mismatched import with_mismatched
from posttrain_jax.data.preference_groups import NO_LABEL
from posttrain_jax.data.preference_rows import PreferenceRows, row_shape
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.forward.completions import policy_logps
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer

OPTIONS = kto.Options(beta=0.1, desirable_weight=1.0, undesirable_weight=1.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six prompts, good and bad in turn."""
    folder = tmp_path_factory.mktemp("labels")
    rows = [
        {"prompt": f"question {i}" + "?" * i, "completion": f"answer {i}" * (i % 3 + 1), "label": i % 2 == 0}
        for i in range(6)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_preferences(str(folder / "rows.jsonl"), byte_tokenizer(), cache_dir=folder)


def batch_of(data, mesh, micro_batches):
    paired = with_mismatched(data, seed=0, max_length=0)
    shape = row_shape([paired], groups=8, length=256)
    rows = PreferenceRows(paired.sources[0], shape)
    taken = [rows[i] if i < 6 else None for i in range(8)]
    return put_batch(rows.collate(taken), mesh, micro_batches, PreferenceBatch)


def test_each_prompt_gets_the_completion_of_another(data):
    before, after = data.sources[0], with_mismatched(data, seed=0, max_length=0).sources[0]
    partners = set()
    for i in range(6):
        own, mixed = after.group(i).sequences
        np.testing.assert_array_equal(own.tokens, before.group(i).sequences[0].tokens)
        prompt = int(np.argmax(own.loss_mask))
        np.testing.assert_array_equal(mixed.tokens[:prompt], own.tokens[:prompt])
        completions = [
            j
            for j in range(6)
            if np.array_equal(
                mixed.tokens[prompt:],
                before.group(j).sequences[0].tokens[before.group(j).sequences[0].loss_mask],
            )
        ]
        assert len(completions) == 1 and completions[0] != i
        partners.add(completions[0])
        assert after.group(i).labels.tolist() == [i % 2 == 0, NO_LABEL]
    assert partners == set(range(6))
    assert after.row_id(3) == before.row_id(3)


@pytest.mark.parametrize("counts", [[1, 1], [3, 3], [2, 1, 3], [5, 1, 2], [9, 1], [1, 1, 1, 1]])
def test_the_mismatched_completion_is_of_another_prompt(counts, tmp_path):
    """Also where prompts repeat. Each completion is taken once, unless more than half are of one prompt."""
    rows = [
        {"prompt": f"prompt {'abcd'[p]}", "completion": f" {'abcd'[p]}{k}", "label": k % 2 == 0}
        for p, count in enumerate(counts)
        for k in range(count)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = build_preferences(str(tmp_path / "rows.jsonl"), byte_tokenizer(), cache_dir=tmp_path)
    for seed in range(5):
        source = with_mismatched(before, seed=seed, max_length=0).sources[0]
        texts = [
            byte_tokenizer().decode(source.group(i).sequences[1].tokens, skip_special_tokens=True)
            for i in range(len(rows))
        ]
        assert all(text.startswith(row["prompt"]) for text, row in zip(texts, rows, strict=True))
        assert all(text.split()[1] != text.split()[2][0] for text in texts)
        taken = {text.split()[2] for text in texts}
        if 2 * max(counts) <= sum(counts):
            assert len(taken) == len(rows)
        else:
            assert len(taken) >= sum(counts) - max(counts)


def test_one_prompt_has_no_mismatched_completion(tmp_path):
    rows = [{"prompt": "p", "completion": f" {k}", "label": True} for k in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = build_preferences(str(tmp_path / "rows.jsonl"), byte_tokenizer(), cache_dir=tmp_path)
    with pytest.raises(InputError, match="completions of one prompt only.*at least two prompts"):
        with_mismatched(data, seed=0, max_length=0)


def test_the_baseline_is_the_mean_log_ratio_of_mismatched_completions(data):
    """With a reference of 2 nats less than the policy everywhere, z0 = 2; of 2 nats more, max(0, -2) = 0."""
    mesh = make_mesh(1, 1, 1)
    batch = batch_of(data, mesh, 1)
    model, params = tiny_model("llama"), tiny_params("llama")
    score = jax.jit(functools.partial(policy_logps, model=model, share_prompt=True))
    logps = score(params, jax.tree.map(lambda leaf: leaf[0], batch))[None, ..., 0]
    baseline = jax.jit(functools.partial(kto.baseline, model=model, share_prompt=True))
    for shift, want in ((-2.0, 2.0), (2.0, 0.0)):
        shifted = PreferenceBatch(**{**vars(batch), "reference_logps": logps + shift})
        z0 = baseline(params, shifted)
        np.testing.assert_allclose(float(z0), want, atol=1e-4)


def test_micro_batches_and_meshes_do_not_change_the_step(data):
    model, params = tiny_model("llama"), tiny_params("llama")

    def compute(params, batch):
        shifted = PreferenceBatch(**{**vars(batch), "reference_logps": -6.0 * batch.lengths})
        z0 = kto.baseline(params, shifted, model=model, share_prompt=True)

        def loss_sum(params, micro):
            return kto.label_losses(params, micro, z0, model=model, options=OPTIONS, share_prompt=True)

        gradients, metrics = gradient_sums(
            loss_sum, params, shifted, used=used_micro_batches(batch.segment_ids)
        )
        return z0, metrics["loss"].sum, metrics["loss"].count, gradients

    def run(shape, cuts):
        mesh = make_mesh(*shape)
        step = jit_step(compute, mesh, in_shardings=None, out_shardings=replicated(mesh))
        return step(jax.device_put(params, replicated(mesh)), batch_of(data, mesh, cuts))

    want = run((1, 1, 1), 1)
    assert float(want[0]) > 0 and float(want[2]) == 6
    assert all(float(jnp.linalg.norm(leaf)) > 0 for leaf in jax.tree.leaves(want[3]))
    assert_same(run((1, 1, 1), 8), want)
    assert_same(run((2, 1, 1), 4), want)


def test_the_config_has_the_keys_of_kto_alone():
    config = get_config("tiny")
    assert experiment_of(config).options.beta == 0.1
    assert "dpo" not in config and "reward" not in config
    config.dpo = {"loss": "ipo"}
    with pytest.raises(InputError, match="has the section 'dpo', which algorithm=kto does not read"):
        experiment_of(config)


def test_the_batches_of_an_evaluation_do_not_change_it(tmp_path, monkeypatch):
    """Sixteen held-out prompts, 8 or 16 at once, with parameters that are no longer the reference's."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    found = []
    for rows in (8, 16):
        config = get_config("tiny")
        config.mesh.data = config.train.rows_per_step = 8
        config.kto.beta = 3.0
        config.data.eval, config.eval.batch_rows, config.eval.prompts = "split:16", rows, ()
        task = task_of(config, tmp_path)
        state = task.init_state()
        moved = dataclasses.replace(state, params=jax.tree.map(lambda leaf: 0.5 * leaf, state.params))
        assert task.evaluate is not None
        found.append(task.evaluate(moved))
        task.collector.close()
    assert found[0]["eval/kl"] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_rows_without_labels_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    pairs = build_preferences(str(tmp_path / "rows.jsonl"), byte_tokenizer(), cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"rows\.jsonl holds rows without a label; KTO takes"):
        with_mismatched(pairs, seed=0, max_length=0)
