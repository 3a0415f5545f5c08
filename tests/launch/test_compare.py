"""launch.compare: two evaluations of the same rows, and folders that do not belong together."""

from __future__ import annotations

import json

import pytest
from entry_points import ROOT
from tiny_model import launch, save_tiny_model

from launch.compare import compare
from launch.config import load_file
from launch.evaluate import evaluate
from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.comparison import compare_rows


def evaluation(folder, scores, **change):
    """A folder as launch.evaluate leaves it: one row for each (id, right or wrong)."""
    folder.mkdir()
    rows = [
        {"id": key, "prompt": f"question {key}", "metrics": {"accuracy": [right, 1.0]}, **change}
        for key, right in scores
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text("{}")
    return folder


def test_rows_are_paired_by_id_in_any_order(tmp_path, capsys):
    """b is right on x, y and z, a on z alone: 1/4 and 3/4, better on 2 rows, exact p = 2 * 1/4."""
    a = evaluation(tmp_path / "a", [("x", 0.0), ("y", 0.0), ("z", 1.0), (4, 0.0)])
    b = evaluation(tmp_path / "b", [(4, 0.0), ("z", 1.0), ("y", 1.0), ("x", 1.0)])
    record = compare(a, b, tmp_path / "new" / "c.json", resamples=100, seed=0)
    assert json.loads((tmp_path / "new" / "c.json").read_text()) == record
    found = record["metrics"]["accuracy"]
    assert (found["a"]["value"], found["b"]["value"], found["difference"]["value"]) == (0.25, 0.75, 0.5)
    assert (found["rows"], found["better"], found["worse"], found["sign_p"]) == (4, 2, 0, 0.5)
    out = capsys.readouterr().out
    assert "accuracy" in out and "0.2500" in out and "+0.5000" in out


@pytest.mark.parametrize(
    ("a", "b", "change", "words"),
    [
        ([(1, 1.0), (2, 1.0)], [(1, 1.0)], {}, "1 of a's 2 rows, the first with id 2, are not in the other"),
        ([(1, 1.0)], [(1, 1.0), ("1", 1.0)], {}, "1 of b's 2 rows, the first with id '1'"),
        ([(1, 1.0)], [(1, 1.0), (1, 0.0)], {}, "The id 1 is in b twice"),
        ([(1, 1.0)], [(1, 1.0)], {"prompt": "other"}, "Row 1 has another prompt in a than in b"),
        ([(1, 1.0)], [(1, 1.0)], {"metrics": {"acc": [1.0, 1.0]}}, "Row 1 does not have the same metrics"),
        (
            [(1, 1.0)],
            [(1, 1.0)],
            {"metrics": {"accuracy": [1.0, 2.0]}},
            "counts 1 for accuracy in a and 2 in b",
        ),
        ([(1, 1.0)], [(1, 1.0)], {"metrics": None}, "Row 1 of b has no id or no metrics"),
        ([(1, 1.0)], [(1, 1.0)], {"metrics": {"accuracy": 1.0}}, "Row 1 of b has no id or no metrics"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(tmp_path, a, b, change, words):
    a, b = evaluation(tmp_path / "a", a), evaluation(tmp_path / "b", b, **change)
    with pytest.raises(InputError, match=words):
        compare(a, b, tmp_path / "c.json", resamples=100, seed=0)
    assert not (tmp_path / "c.json").exists()


def test_folders_without_a_finished_evaluation_are_refused(tmp_path):
    good = evaluation(tmp_path / "a", [(1, 1.0)])
    with pytest.raises(
        InputError, match=r"b has no results\.json; give a folder that launch.evaluate has finished"
    ):
        compare(good, tmp_path / "b", tmp_path / "c.json", resamples=100, seed=0)
    torn = evaluation(tmp_path / "torn", [(1, 1.0)])
    (torn / "rows.jsonl").write_text('{"id": 1, "met')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: .*is broken"):
        compare(good, torn, tmp_path / "c.json", resamples=100, seed=0)
    with pytest.raises(InputError, match="--resamples is 0"):
        compare(good, good, tmp_path / "c.json", resamples=0, seed=0)
    with pytest.raises(InputError, match="--seed is -1; it must be 0 or more"):
        compare(good, good, tmp_path / "c.json", resamples=100, seed=-1)
    with pytest.raises(InputError, match="a holds no rows"):
        compare_rows([], [])


def test_two_models_on_the_same_held_out_rows(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{n}? ", "completion": "yes" * n}) + "\n" for n in range(1, 7))
    )
    config = load_file(f"{ROOT}/configs/eval/held_out.py:tiny")
    config.data.eval, config.data.max_length = str(path), 64
    records = {}
    for name, scale in (("a", 8.0), ("b", 1.0)):
        model = save_tiny_model(tmp_path / f"model-{name}", scale=scale)
        records[name] = evaluate(str(model), config, tmp_path / name)
    found = compare(tmp_path / "a", tmp_path / "b", tmp_path / "c.json", resamples=1000, seed=0)["metrics"]
    assert set(found) == {"loss_per_token", "token_accuracy", "loss_per_sequence"}
    for metric, comparison in found.items():
        for name in ("a", "b"):
            assert comparison[name]["value"] == pytest.approx(records[name]["metrics"][metric]["value"])
    # The flatter model is better on each of the 6 rows: p = 2 / 2^6.
    assert found["loss_per_token"]["worse"] == 6
    assert found["loss_per_token"]["sign_p"] == 2 / 64


def test_from_the_command_line(tmp_path):
    a, b = evaluation(tmp_path / "a", [(1, 1.0)]), evaluation(tmp_path / "b", [(1, 0.0)])
    done = launch("compare", f"--a={a}", f"--b={b}")
    assert done.returncode == 0, done.stderr
    assert json.loads((b / "comparison.json").read_text())["metrics"]["accuracy"]["worse"] == 1
    done = launch("compare", f"--a={a}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --a and --b are needed; an example: python -m launch.compare")
