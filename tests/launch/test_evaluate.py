"""launch.evaluate: results.json and rows.jsonl of every task, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from entry_points import ROOT
from tiny_model import launch, save_tiny_model

from launch.config import flatten, load_file
from launch.evaluate import evaluate
from launch.train import run as train
from posttrain_jax.core.errors import InputError
from posttrain_jax.data.split import hold_out
from posttrain_jax.data.tokenized import TokenizeOptions, build
from posttrain_jax.evaluate import kl_to_reference, own_data
from posttrain_jax.evaluate.held_out import held_out_loss, held_out_rows
from posttrain_jax.evaluate.options import TASKS
from posttrain_jax.models.io.load import load_model

CONFIG = str(ROOT / "configs/eval/held_out.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def config_for(tmp_path, count=9, **data):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {i}? ", "completion": "yes" * (i + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_file(f"{CONFIG}:tiny")
    config.data.train = str(path)
    config.data.max_length = 64
    for key, value in data.items():
        config.data[key] = value
    return config


def test_the_files_hold_what_the_function_found(model, tmp_path, capsys):
    config = config_for(tmp_path, eval=str(tmp_path / "rows.jsonl"))
    out = tmp_path / "new" / "eval"
    record = evaluate(str(model), config, out)
    saved = json.loads((out / "results.json").read_text())
    assert saved == json.loads(json.dumps(record))
    assert saved["counts"]["sequences"] == 9
    assert saved["counts"]["trained_tokens"] == sum(3 * (i + 1) + 1 for i in range(9))  # + the EOS

    loaded = load_model(str(model))
    direct = held_out_loss(loaded.model, loaded.params, held_out_rows(config, loaded, tmp_path))
    for name, estimate in direct.metrics.items():
        assert saved["metrics"][name]["value"] == pytest.approx(estimate.value, rel=1e-4), name
        assert saved["metrics"][name]["low"] <= saved["metrics"][name]["value"]
        assert saved["metrics"][name]["value"] <= saved["metrics"][name]["high"]
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 9
    total = sum(row["loss"] for row in rows) / sum(row["trained_tokens"] for row in rows)
    assert total == pytest.approx(saved["metrics"]["loss_per_token"]["value"], rel=1e-9)
    assert {row["row"] for row in rows} == {f"{tmp_path}/rows.jsonl:{n}" for n in range(1, 10)}
    out = capsys.readouterr().out
    assert out.startswith(f"data: 9 of {tmp_path}/rows.jsonl\n") and "loss_per_token" in out


def test_kl_of_a_model_from_itself_and_from_another(model, tmp_path):
    """From itself 0 for every answer; from a blunter one more than 0, by k3 for sure."""
    config = load_file(f"{ROOT}/configs/eval/kl.py:tiny")
    config.data.eval = str(ROOT / "configs/tiny/instructions.jsonl")
    config.data.prompt = "{prompt}"
    config.reference.model = str(model)
    same = evaluate(str(model), config, tmp_path / "same")["metrics"]
    assert abs(same["kl_k1_per_sequence"]["value"]) < 1e-3
    assert same["kl_k3_per_token"]["value"] < 1e-6
    config.reference.model = str(save_tiny_model(tmp_path / "blunt", scale=2.0))
    far = evaluate(str(model), config, tmp_path / "far")
    assert far["metrics"]["kl_k3_per_token"]["value"] > 0.1
    assert 1 <= far["metrics"]["tokens_per_sequence"]["value"] <= 8
    rows = [json.loads(line) for line in (tmp_path / "far/rows.jsonl").read_text().splitlines()]
    sums = [row["metrics"]["kl_k3_per_sequence"] for row in rows]
    mean = sum(value for value, _ in sums) / sum(count for _, count in sums)
    assert mean == pytest.approx(far["metrics"]["kl_k3_per_sequence"]["value"])
    assert all(len(row["answers"]) == 1 for row in rows)


def test_kl_needs_a_reference_with_the_same_tokens(model, tmp_path):
    config = load_file(f"{ROOT}/configs/eval/kl.py:tiny")
    config.reference.model = ""
    with pytest.raises(InputError, match="reference.model is empty"):
        evaluate(str(model), config, tmp_path)


def test_split_takes_the_same_rows_whatever_the_batch(model, tmp_path):
    config = config_for(tmp_path, eval="split:4")
    names = []
    for batch_rows in (1, 8):
        config.eval.batch_rows = batch_rows
        evaluate(str(model), config, tmp_path / "out")
        lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
        names.append({json.loads(line)["row"] for line in lines})
    assert names[0] == names[1] and len(names[0]) == 4


def own(tmp_path, model, algorithm="sft", **changes):
    """The tiny model, as the one of a workdir whose run had these data: of 20 rows 12 fit into its max_length."""
    rows = [{"prompt": f"question {i}? ", "completion": "yes" * (i % 5 + 1)} for i in range(20)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "train": str(tmp_path / "own.jsonl"),
        "eval": "split:4",
        "max_length": 24,
        "truncate": "drop",
        "on_bad_row": "stop",
        "train_on": "last_turn",
        "chat_template": "gone.jinja",
    }
    run = {"seed": 3, "algorithm": algorithm, "data": data | changes, "model": {"init": str(model)}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    loaded = load_model(str(model))
    return dataclasses.replace(
        loaded, source=dataclasses.replace(loaded.source, kind="workdir", path=tmp_path)
    )


def names(parts):
    return [part.row_id(i) for part in parts for i in range(len(part))]


def test_a_workdir_is_evaluated_on_what_its_run_held_out(model, tmp_path):
    """By the run's seed, length and rules, whatever the evaluation's seed."""
    config, loaded = load_file(CONFIG), own(tmp_path, model)

    def evaluated(**data):
        config.data.update(data)
        return names(part.source for part in held_out_rows(config, loaded, tmp_path))

    whole = build(
        str(tmp_path / "own.jsonl"), loaded.tokenizer, TokenizeOptions(max_length=24, truncate="drop")
    )
    held, other = (names(hold_out(whole, 4, seed=seed)[1].sources) for seed in (3, 0))
    assert len(whole) == 12 and sorted(held) != sorted(other)
    assert evaluated() == evaluated(eval="split:4") == held
    assert evaluated(eval="", first=2) == held[:2]
    # The run's data by name are divided as the run did; a file is read whole, by the run's rules.
    assert evaluated(first=0, train=str(tmp_path / "own.jsonl"), eval="split:4") == held
    assert len(evaluated(train="", eval=str(tmp_path / "own.jsonl"))) == 12
    assert len(evaluated(truncate="right")) == 20
    loaded = own(tmp_path, model, eval=str(tmp_path / "own.jsonl"))
    assert len(evaluated(eval="", truncate="")) == 12


@pytest.mark.slow
def test_a_real_run_is_evaluated_on_the_rows_of_its_own_evaluation(tmp_path, monkeypatch, capsys):
    """The loss is the one that the run's last evaluation found; the seed is another than the evaluation's."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    config = load_file("configs/sft/smollm2_135m.py:tiny")
    config.seed, config.train.steps, config.log.tensorboard, config.eval.prompts = 5, 1, False, ()
    config.train.rows_per_step = config.eval.batch_rows = 8  # as many as devices
    train(config, tmp_path / "run")
    ended = json.loads((tmp_path / "run" / "summary.json").read_text())
    capsys.readouterr()
    record = evaluate(str(tmp_path / "run"), load_file(CONFIG), tmp_path / "out")
    said = f"of {config.data.train}, held out by {config.data.eval} with seed 5"
    assert record["data"].endswith(said) and said in capsys.readouterr().out
    assert record["metrics"]["loss_per_token"]["value"] == pytest.approx(
        ended["metrics"]["eval/loss"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"eval": ""}, "held nothing out .*; say what to evaluate on"),
        ({"algorithm": "dpo"}, r"\(dpo\) held out no rows of the kind .* give some in data.eval"),
    ],
)
def test_a_run_that_has_no_rows_for_an_evaluation_says_so(model, tmp_path, run, words):
    with pytest.raises(InputError, match=words):
        held_out_rows(load_file(CONFIG), own(tmp_path, model, **run), tmp_path)


@pytest.mark.parametrize(
    ("algorithm", "row", "data"),
    [
        ("sft", {"prompt": "Why? ", "completion": "So."}, {}),
        ("dpo", {"prompt": "Why? ", "chosen": "So.", "rejected": "No."}, {}),
        ("ppo", {"prompt": "Why? "}, {"prompt_tokens": 0, "long_prompts": "error"}),
    ],
)
def test_the_prompts_that_a_run_held_out(model, tmp_path, algorithm, row, data):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    loaded = own(tmp_path, model, algorithm, eval=str(path), **data)
    run = own_data.run_config(loaded) | {"rollout": {"max_new_tokens": 4}}
    (prompt,) = own_data.held_out_prompts(run, loaded, own_data.held_out_by(run, "run"))
    assert (prompt.text, prompt.key) == ("Why? ", f"{path}:1")
    assert prompt.tokens.tolist() == loaded.tokenizer("Why? ")["input_ids"]


def test_the_reference_is_what_the_run_started_from(model, tmp_path):
    config = load_file(f"{ROOT}/configs/eval/kl.py")
    assert kl_to_reference._reference_of(config, own(tmp_path, model)) == str(model)
    config.reference.model = "other"
    assert kl_to_reference._reference_of(config, own(tmp_path, model)) == "other"


def test_every_config_of_the_readme_has_the_flags_it_is_shown_with():
    """Those of the commands, and those that the text gives to all evaluations."""
    text = (ROOT / "README.md").read_text()
    for line in text.splitlines():
        named = re.search(r"--config=(configs/\S+)", line)
        if named:
            known = flatten(load_file(named[1]))
            assert set(re.findall(r"--config\.([\w.]+)=", line)) <= set(known), line
    for path in sorted((ROOT / "configs/eval").glob("*.py")):
        if "def get_config(" in path.read_text():
            known = flatten(load_file(str(path)))
            assert {"data.eval", "data.first", *(["data.prompt"] if path.stem != "held_out" else [])} <= set(
                known
            )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"eval": ""}, "data.eval is empty"),
        ({"eval": "no/such/file.jsonl"}, "no/such/file.jsonl does not exist"),
        ({"eval": "split:4", "train": ""}, "part of data.train, which is empty"),
        ({"max_length": 4096}, "more than the model's context of 128"),
        ({"max_length": 0}, "data.max_length is 0; it must be at least 2"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(model, tmp_path, data, words):
    with pytest.raises(InputError, match=words):
        evaluate(str(model), config_for(tmp_path, **data), tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("name", "metrics", "counts"),
    [
        (
            "ifeval",
            ["prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose"],
            {"rows": 4, "instructions": 5, "errors": 0},
        ),
        ("math", ["accuracy"], {"rows": 4, "errors": 0}),
        ("multiple_choice", ["acc", "acc_norm", "acc_bytes"], {"rows": 4, "choices": 12}),
    ],
)
def test_every_task_writes_its_rows_and_numbers(model, tmp_path, monkeypatch, capsys, name, metrics, counts):
    monkeypatch.chdir(ROOT)
    record = evaluate(str(model), load_file(f"configs/eval/{name}.py:tiny"), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved == json.loads(json.dumps(record))
    assert saved["task"] == name
    assert list(saved["metrics"]) == metrics
    assert {key: saved["counts"][key] for key in counts} == counts
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 4
    for metric in metrics:
        sums, numbers = zip(*(row["metrics"][metric] for row in rows), strict=True)
        assert saved["metrics"][metric]["value"] == pytest.approx(sum(sums) / sum(numbers))
    out = capsys.readouterr().out
    assert out.startswith("data: 4 of ") and metrics[0] in out and saved["data"] == out.split("\n")[0][6:]


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("ifeval", "eval.task", "bench", f"eval.task is 'bench'; it must be one of {', '.join(TASKS)}"),
        ("ifeval", "eval.bootstrap", -1, "eval.bootstrap is -1"),
        ("ifeval", "seed", -1, "seed is -1; it must be 0 or more"),
        ("ifeval", "data.eval", "", "data.eval is empty"),
        ("ifeval", "data.on_bad_row", "ask", "data.on_bad_row is 'ask'; use one of stop, skip"),
        ("math", "data.prompt", "What?", "must name columns"),
        (
            "math",
            "data.answer",
            "solution",
            "solution: is missing .the columns are id, kind, question, answer",
        ),
        ("math", "eval.max_new_tokens", -1, "max_new_tokens is -1"),
        ("multiple_choice", "data.choices", "options", "options: is missing"),
        ("multiple_choice", "data.eval", "nowhere.jsonl", "nowhere.jsonl does not exist"),
    ],
)
def test_a_task_that_cannot_be_done_is_refused(model, tmp_path, monkeypatch, name, key, value, words):
    monkeypatch.chdir(ROOT)
    config = load_file(f"configs/eval/{name}.py:tiny")
    section, _, last = key.rpartition(".")
    (config[section] if section else config)[last] = value
    with pytest.raises(InputError, match=words):
        evaluate(str(model), config, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_from_the_command_line(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "some words"}\n{"text": 5}\n')
    flags = [
        f"--model={model}",
        "--config=configs/eval/held_out.py:tiny",
        f"--config.data.eval={path}",
        "--config.data.max_length=32",
        f"--out={tmp_path}/out",
    ]
    done = launch("evaluate", *flags)
    assert done.returncode == 2
    assert "rows.jsonl, line 2, text: is a number, not text" in done.stderr
    done = launch("evaluate", *flags, "--config.data.on_bad_row=skip")
    assert done.returncode == 0, done.stderr
    assert "perplexity_per_sequence" in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["counts"]["sequences"] == 1
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["line"] == 2
    done = launch("evaluate", *flags, "--config.eval.batchrows=3")
    assert done.returncode == 2
    assert "eval.batch_rows" in done.stderr and "Traceback" not in done.stderr
