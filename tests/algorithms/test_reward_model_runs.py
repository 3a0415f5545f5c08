"""Runs of reward models: the scale of their scores, what they may start from, exports, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from contracts.tiny import make_mesh
from ml_collections import ConfigDict
from tasks import experiment_of, spec_of, task_of

from algorithms import tiny
from configs.reward_model.smollm2_135m import get_config
from launch.config import with_algorithm
from launch.export import export
from launch.train import run
from posttrain_jax.core.errors import InputError
from posttrain_jax.data.preference_rows import Preferences
from posttrain_jax.forward.completions import map_completions, reward_scores
from posttrain_jax.models.io.load import load_members, load_model
from posttrain_jax.wiring.offline import preferences_of


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir and the data that it was trained on."""

    workdir: Path
    data: Preferences


def config_of(**reward) -> ConfigDict:
    config = get_config("tiny")
    config.mesh.data = config.train.rows_per_step = config.eval.batch_rows = 8
    config.log.tensorboard = False
    config.train.steps = 2
    for name, value in reward.items():
        config.reward[name] = value
    return config


def data_of_run(config: ConfigDict, folder: Path) -> Preferences:
    return preferences_of(experiment_of(config), spec_of(config), folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Run:
    """A whole run of one model, with a moving average of its weights."""
    folder, config = tmp_path_factory.mktemp("single"), config_of()
    config.optim.ema = 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(folder / "cache"))
        run(config, folder / "run")
        return Run(folder / "run", data_of_run(config, folder))


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory) -> Run:
    """Two members with LoRA, normalized but not trained: `tests/contracts/test_killed.py` trains one."""
    folder, config = tmp_path_factory.mktemp("ensemble"), config_of(members=2, normalize="unit")
    config.model.lora.rank = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(folder / "cache"))
        tiny.untrained_reward_run(config, folder / "run")
        return Run(folder / "run", data_of_run(config, folder))


def train_scores(loaded, data: Preferences) -> np.ndarray:
    """Of every sequence of the store (0 where it is held out)."""
    score = functools.partial(reward_scores, model=loaded.model, share_prompt=True)
    (source,) = data.train.sources
    return map_completions(
        score, loaded.params, source, data.shape, make_mesh(1, 1, 1), groups=8, micro_batches=4
    )


@pytest.mark.slow
@pytest.mark.parametrize("ema", [False, True])
def test_preferred_completions_score_0_after_a_run(single, ema):
    loaded = load_model(str(single.workdir), ema=ema)
    assert float(loaded.params["score_head"]["gain"]) == 1
    assert float(loaded.params["score_head"]["bias"]) != 0
    (source,) = single.data.train.sources
    scores_S = train_scores(loaded, single.data)
    groups = [source.group(i) for i in range(len(source))]
    preferred = np.asarray([scores_S[g.first_sequence + g.comparisons[0].better] for g in groups])
    assert abs(preferred.mean()) < 1e-5 < preferred.std()
    rows = [json.loads(line) for line in (single.workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "train/accuracy", "train/margins", "train/pairs"} <= rows[1].keys()
    assert rows[-1].keys() >= {"eval/reward_accuracy", "eval/margins", "eval/loss"}


@pytest.mark.slow
def test_all_completions_of_every_member_have_mean_0_and_variance_1(ensemble):
    members = load_members(str(ensemble.workdir))
    assert len(members) == 2
    (source,) = ensemble.data.train.sources
    places = [
        group.first_sequence + k
        for group in (source.group(i) for i in range(len(source)))
        for k in range(len(group.sequences))
    ]
    found = []
    for loaded in members:
        scores = train_scores(loaded, ensemble.data)[places]
        assert abs(scores.mean()) < 1e-4 and abs(scores.var() - 1) < 1e-4
        found.append(scores)
    assert np.abs(found[0] - found[1]).max() > 0.1
    shared, own = ("embed", "embedding"), ("layers", "attn", "q", "lora_a")
    for path, same in ((shared, True), (own, False)):
        leaves = [functools.reduce(lambda tree, name: tree[name], path, m.params) for m in members]
        assert bool(jnp.array_equal(*leaves)) == same


@pytest.mark.slow
def test_an_ensemble_is_no_single_model(ensemble, tmp_path):
    with pytest.raises(InputError, match=r"an ensemble of 2 reward models.*--member"):
        load_model(str(ensemble.workdir))
    for member in (2, -1):
        with pytest.raises(InputError, match=rf"--member={member}: .* holds the members 0 to 1\."):
            export(str(ensemble.workdir), tmp_path / "out", member=member)
    export(str(ensemble.workdir), tmp_path / "out", member=1)
    want = load_members(str(ensemble.workdir))[1]
    got = load_model(str(tmp_path / "out"))
    assert got.lora.rank == 0
    np.testing.assert_allclose(train_scores(got, ensemble.data), train_scores(want, ensemble.data), atol=1e-4)


@pytest.mark.slow
def test_a_language_model_does_not_start_from_a_reward_model(single):
    config = config_of()
    config.model.init = str(single.workdir)
    assert spec_of(config, is_reward=True).source is not None
    config = with_algorithm(config, "dpo")
    with pytest.raises(InputError, match="is a reward model.*algorithm=dpo starts from a language model"):
        spec_of(config)


@pytest.mark.slow
def test_transformers_gives_the_exported_scores(single, tmp_path):
    """Score of transformers + score_bias = ours, on every completion that was trained on."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")
    from transformers import AutoModelForSequenceClassification

    export(str(single.workdir), tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    bias = json.loads((tmp_path / "out" / "config.json").read_text())["score_bias"]
    ours_S = train_scores(load_model(str(single.workdir)), single.data)
    (source,) = single.data.train.sources
    for group in (source.group(i) for i in range(len(source))):
        for k, encoded in enumerate(group.sequences):
            with torch.no_grad():
                found = theirs(torch.tensor(encoded.tokens[None].astype(np.int64))).logits[0, 0]
            assert float(found) + bias == pytest.approx(ours_S[group.first_sequence + k], abs=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "reward.loss is 'hinge'; use one of bradley_terry"),
        ({"normalize": "mean"}, "reward.normalize is 'mean'; use one of none"),
        ({"label_smoothing": 0.5}, "reward.label_smoothing is 0.5"),
        ({"members": 0}, "reward.members is 0"),
        (
            {"margin_scale": 2.0},
            "reward.margin_scale is 2, and reward.loss=bradley_terry does not look at it",
        ),
        ({"loss": "regression", "normalize": "unit"}, "reward.normalize=unit would change the ratings"),
    ],
)
def test_bad_options_are_named(changes, message):
    config = get_config("tiny")
    for name, value in changes.items():
        config.reward[name] = value
    with pytest.raises(InputError, match=message):
        experiment_of(config)


def test_an_ensemble_does_not_start_from_one_head(tmp_path):
    policy = spec_of(get_config("tiny"))
    policy.describe(tmp_path / "model", reward=True)
    config = config_of(members=2)
    config.model.init = str(tmp_path / "model")
    with pytest.raises(InputError, match="is a reward model, whose head every member would start with"):
        task_of(config, tmp_path)


@pytest.mark.parametrize("normalize", ["demonstrations", "none"])
def test_a_regression_is_left_as_it_predicts(normalize, tmp_path, monkeypatch):
    """Equal ratings are ratings, too."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": "p", "completions": ["a", "b"], "scores": [2, 2]} for _ in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(loss="regression", normalize=normalize)
    config.data.train, config.data.eval = str(tmp_path / "rows.jsonl"), ""
    assert task_of(config, tmp_path).finish is None


@pytest.mark.parametrize(
    ("loss", "row", "message"),
    [
        ("regression", {"prompt": "p", "chosen": "a", "rejected": "b"}, "holds no rating"),
        ("bradley_terry", {"prompt": "p", "completion": "a", "rating": 1.0}, "holds no comparison"),
    ],
)
def test_data_that_do_not_fit_the_loss_are_refused(loss, row, message, tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = config_of()
    config.data.train, config.data.eval = str(tmp_path / "rows.jsonl"), ""
    config.reward.loss = loss
    with pytest.raises(InputError, match=message):
        task_of(config, tmp_path)
