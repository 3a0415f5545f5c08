"""Every config builds, is what its golden text says, and takes two finite steps in `:tiny`."""

from __future__ import annotations

import difflib
import json
import math
import re
from pathlib import Path

import pytest
from contracts.conftest import Processes
from write_golden import GOLDEN, ROOT, golden_path, render, specs

from configs.dpo.smollm2_135m import get_config as preferences
from configs.ppo.letters import get_config as letters
from configs.sft.smollm2_135m import get_config as smollm2
from launch.config import flatten, load_file
from launch.resume import changes, check_allowed, resolve, write
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import all_leaves
from posttrain_jax.wiring.algorithms import ALGORITHMS, read_experiment, sections_of
from posttrain_jax.wiring.saved_config import read_run

SPECS = specs()
TRAINED = [spec for spec in SPECS if "/eval/" not in spec]


@pytest.mark.parametrize("spec", SPECS)
def test_a_config_is_what_its_golden_text_says(spec: str):
    path = golden_path(spec)
    assert path.is_file(), f"{spec} is new; run: python tests/configs/write_golden.py"
    want, got = path.read_text().splitlines(), render(spec).splitlines()
    difference = "\n".join(difflib.unified_diff(want, got, "golden", spec, lineterm="", n=0))
    assert not difference, f"if this is meant, run: python tests/configs/write_golden.py\n{difference}"


def test_no_golden_text_is_left_over():
    assert {path.name for path in GOLDEN.iterdir()} == {golden_path(spec).name for spec in SPECS}


def test_every_config_has_a_tiny_variant():
    assert {spec for spec in SPECS if ":" not in spec} == {
        spec.removesuffix(":tiny") for spec in SPECS if ":tiny" in spec
    }


@pytest.mark.parametrize("spec", TRAINED)
def test_a_config_has_the_keys_of_its_algorithm_and_legal_values(spec: str):
    config = load_file(str(ROOT / spec))
    if config.algorithm in ALGORITHMS:
        assert flatten(config).keys() == all_leaves(sections_of(config.algorithm)).keys()
        read_experiment(config.to_dict())
    assert (config.train.steps > 0) != (config.train.epochs > 0)
    template = config.data.chat_template
    assert not template or (ROOT / template).is_file()
    assert len((ROOT / spec.split(":")[0]).read_text().splitlines()) <= 80


@pytest.mark.parametrize("spec", [spec for spec in SPECS if ":" not in spec])
def test_an_unknown_variant_is_refused_with_those_there_are(spec: str):
    with pytest.raises(InputError, match="unknown variant 'huge'.*tiny"):
        load_file(f"{ROOT / spec}:huge")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    return Processes(tmp_path_factory.mktemp("configs"))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in TRAINED if ":tiny" in spec])
def test_two_tiny_steps_are_finite(processes: Processes, spec: str, tmp_path: Path):
    ended = processes.run(
        "launch.train", f"--config={spec}", f"--workdir={tmp_path}/run", "--config.train.steps=2"
    )
    assert ended.code == 0, ended.err
    assert ended.err == ""
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert "/ppo/" in spec or min(losses) > 0  # PPO's is a ratio times an advantage
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "complete"


def test_what_a_resume_may_change(tmp_path):
    """How a run is carried out, such as how many answers are written side by side, and not what it is."""
    config = letters("tiny")
    write(resolve(config), tmp_path)
    config.rollout.batch_size, config.rollout.max_logp_difference = 4, 0.5
    config.score.workers, config.score.seconds, config.mesh.fsdp = 3, 99.0, 2
    assert [change.key for change in changes(config, tmp_path)] == [
        "mesh.fsdp",
        "rollout.batch_size",
        "rollout.max_logp_difference",
        "score.seconds",
        "score.workers",
    ]
    config.rollout.temperature = 0.5
    with pytest.raises(
        InputError, match=r"another config: rollout.temperature \(1.0 then, 0.5 now\)\. Use"
    ) as caught:
        changes(config, tmp_path)
    assert "--allow_change" not in str(caught.value)
    with pytest.raises(
        InputError, match=r"--allow_change=rollout.temperature: .* cannot change in the middle"
    ):
        changes(config, tmp_path, ("rollout.temperature",))


def test_what_a_resume_may_change_where_it_is_said(tmp_path, capsys):
    config = letters("tiny")
    write(resolve(config), tmp_path)
    before = config.optim.lr
    config.optim.lr, config.train.steps, config.eval.every = 0.5, 99, 7
    with pytest.raises(InputError, match=r"or --allow_change=eval.every,optim.lr,train.steps to go on"):
        changes(config, tmp_path)
    with pytest.raises(InputError, match=r"another config: eval.every .*--allow_change=eval.every to go on"):
        changes(config, tmp_path, ("optim.lr", "train.steps"))
    with pytest.raises(
        InputError,
        match="--allow_change=optim.lrate: There is no config key 'optim.lrate'; the nearest is 'optim.lr'",
    ):
        check_allowed(config, ("train.steps", "optim.lrate"))
    changed = changes(config, tmp_path, ("optim.lr", "train.steps", "eval.every", "optim.eps"))
    write(resolve(config), tmp_path, step=4, changed=changed)
    (line,) = (tmp_path / "config_history.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 4
    assert json.loads(line)["changes"]["optim.lr"] == [before, 0.5]
    assert changes(config, tmp_path) == []
    (tmp_path / "config.json").unlink()
    config.seed += 1
    assert changes(config, tmp_path) == []
    assert (
        f"{tmp_path}/config.json is gone; the run goes on with the config of this start."
        in capsys.readouterr().out
    )


def test_an_entry_that_is_new_in_a_json_object_may_not_change(tmp_path):
    """And nothing advises to allow it, for it is no key by itself."""
    config = preferences("tiny")
    write(resolve(config), tmp_path)
    config.data.columns = {"prompt": "question"}
    with pytest.raises(
        InputError, match=r"data.columns.prompt \(absent then, 'question' now\)\. Use .* new --workdir\.$"
    ):
        changes(config, tmp_path)


def test_what_the_best_checkpoint_was_judged_by_stays(tmp_path):
    config = letters("tiny")
    config.checkpoint.best_metric = "eval/score"
    write(resolve(config), tmp_path)
    config.eval.temperature = 0.0
    with pytest.raises(InputError, match="eval.temperature .* the best checkpoint so far was judged by it"):
        changes(config, tmp_path, ("eval.temperature",))
    config.eval.temperature, config.data.eval = -1.0, "held_out.jsonl"
    with pytest.raises(InputError, match="data.eval .* a split takes its rows from the training data"):
        changes(config, tmp_path, ("data.eval",))


def test_a_key_that_the_runs_version_did_not_have_has_its_default(tmp_path):
    config = smollm2("tiny")
    old = resolve(config)
    del old["eval"]["weights"]
    write(old, tmp_path)
    assert changes(config, tmp_path) == []
    config.eval.weights, config.optim.ema = "ema", 0.9
    with pytest.raises(InputError, match=r"eval.weights \('raw' then, 'ema' now\).*optim.ema"):
        changes(config, tmp_path)


def test_the_config_of_a_run_of_the_last_version(tmp_path):
    """It held the sections of all algorithms, JSON in texts, and some keys under other names."""
    config = preferences("tiny")
    old = resolve(config)
    mixture = [["a.jsonl", 3], ["b.jsonl", 1]]
    old["data"] |= {"train": json.dumps(mixture), "chat_template_kwargs": '{"greeting": "x"}'}
    old["dpo"] = {"skip_end" if name == "skip_eos" else name: value for name, value in old["dpo"].items()}
    old |= {"kto": {"beta": 0.1}, "reward": {"normalise": "unit", "members": 1}}
    del old["data"]["columns"], old["data"]["text_as"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    config.data.train, config.data.chat_template_kwargs = mixture, {"greeting": "x"}
    assert changes(config, tmp_path) == []
    run = read_run(tmp_path)
    assert run["data"]["train"] == [["a.jsonl", 3.0], ["b.jsonl", 1.0]]
    assert run["data"]["chat_template_kwargs"] == {"greeting": "x"}
    assert (run["dpo"]["skip_eos"], run["data"]["text_as"]) == (False, "plain")
    assert "kto" not in run
    config.dpo.skip_eos = True
    with pytest.raises(InputError, match=r"another config: dpo.skip_eos \(False then, True now\)"):
        changes(config, tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "5", "{", '{"a": 1', '"text"', "[" * 100_000, "\xff", '{"optim.lr": 1}']
)
def test_a_config_file_that_is_not_what_was_written(tmp_path, text: str):
    (tmp_path / "config.json").write_text(text, "latin-1")
    with pytest.raises(InputError, match="config.json is no config in JSON|was started with another config"):
        changes(letters("tiny"), tmp_path)


@pytest.mark.parametrize(("weights", "ema"), [("ema", 0.0), ("average", 0.9)])
def test_weights_to_evaluate_that_are_not_there(weights: str, ema: float):
    config = smollm2("tiny")
    config.eval.weights, config.optim.ema = weights, ema
    with pytest.raises(InputError, match="eval.weights is"):
        read_experiment(config.to_dict())


def test_a_workdir_keeps_no_secrets_of_a_reward_functions_urls(tmp_path: Path):
    """So a run goes on with a new password; with another host it does not."""
    config = letters("tiny")
    config.score.functions = ("m:f",)
    config.score.arguments = {"m:f": {"url": "http://anna:hunter22@h/v1?key=swordfish"}}
    write(resolve(config), tmp_path)
    assert not re.search("hunter22|swordfish", (tmp_path / "config.json").read_text())
    config.score.arguments = {"m:f": {"url": "http://anna:hunter33@h/v1?key=swordfish"}}
    assert changes(config, tmp_path) == []
    config.score.arguments = {"m:f": {"url": "http://anna:hunter33@other/v1?key=swordfish"}}
    with pytest.raises(InputError, match="score.arguments") as raised:
        changes(config, tmp_path)
    assert "hunter33" not in str(raised.value)
