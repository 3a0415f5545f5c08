"""Reward functions in processes of their own: what they return, and every way in which they go wrong."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import reward_cases

from posttrain_jax.core.errors import InputError
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.worker_process import load_function
from posttrain_jax.rewards.workers import FAILURES, PythonReward, RewardWorkers


def answer(text="", **row):
    return Completion("Say:", (1, 2), text, (3, 4), "stop", row)


def reward(function, **settings):
    return PythonReward(f"reward_cases:{function}", **settings)


def counts(**found):
    return dict.fromkeys(FAILURES, 0) | found


def score(function, answers, *, workers=1, **settings):
    with RewardWorkers({"it": reward(function, **settings)}, workers=workers) as pool:
        return pool.score(answers)["it"]


def test_float32_scores_in_the_order_of_the_answers():
    answers = [answer("a" * (n % 7), n=n) for n in range(50)]
    functions = {
        "length": reward("length", seconds=1e9),
        "double": reward("double.score"),
        "scaled": reward("scaled", arguments={"by": 0.1, "plus": 1.0}, completions_per_call=8),
        "order": reward("slow_when_first"),
    }
    with RewardWorkers(functions, workers=3) as pool:
        found = pool.score(answers)
        again = pool.score(answers)
    assert list(found) == list(functions)
    for name, expected in {
        "length": [n % 7 for n in range(50)],
        "double": [2 * (n % 7) for n in range(50)],
        "scaled": [0.1 * (n % 7) + 1.0 for n in range(50)],
        "order": list(range(50)),
    }.items():
        assert found[name].scores_N.dtype == np.float32
        np.testing.assert_array_equal(found[name].scores_N, np.array(expected, np.float32))
        np.testing.assert_array_equal(found[name].scores_N, again[name].scores_N)
        assert found[name].counts == counts() and found[name].errors == {}
        assert found[name].failures == [None] * 50


def test_all_of_an_answer_arrives_and_no_answers_are_no_scores():
    """len("Say:") + (1 + 2) + (3 + 4) + 10 = 24; the second was cut off."""
    cut = Completion([{"role": "user", "content": "x"}], (), "", (), "length", {"n": 1})
    with RewardWorkers({"it": reward("everything")}, workers=1) as pool:
        assert pool.score([answer(n=10), cut])["it"].scores_N.tolist() == [24.0, -1.0]
        empty = pool.score([])["it"]
    assert empty.scores_N.shape == (0,) and empty.scores_N.dtype == np.float32 and empty.failures == []


@pytest.mark.parametrize("workers", [1, 2])
def test_every_failure_is_counted_and_costs_its_own_answer_only(workers):
    """Good answers between the bad ones keep their scores: 0.5, 1 (True), 0.25 (Decimal), and so do later batches."""
    texts = {
        "raise": "raised",
        "exit": "raised",
        "hang": "timed_out",
        "spin": "timed_out",
        "nan": "not_finite",
        "inf": "not_finite",
        "huge": "not_finite",
        "huge int": "not_finite",
        "string": "not_a_number",
        "none": "not_a_number",
        "complex": "not_a_number",
        "list": "not_a_number",
        "kill": "died",
        "quit": "died",
    }
    answers, expected, failures = [answer("0.5")], [0.5], [None]
    for number, (text, failure) in enumerate(texts.items()):
        answers += [answer(text), answer(str(number)), answer("true"), answer("decimal")]
        expected += [-7.5, number, 1.0, 0.25]
        failures += [failure, None, None, None]
    with RewardWorkers({"it": reward("by_text", seconds=2.0, failure_score=-7.5)}, workers=workers) as pool:
        found = pool.score(answers)["it"]
        assert found.scores_N.tolist() == expected
        assert found.failures == failures
        assert found.counts == {
            "raised": 2, "timed_out": 2, "died": 2, "not_finite": 4, "not_a_number": 4, "wrong_count": 0
        }  # fmt: skip
        assert re.fullmatch(
            r"KeyError: 'no such column' \(/.*tests/rewards/reward_cases\.py:\d+\)", found.errors["raised"]
        )
        assert found.errors["timed_out"] == "it took longer than 2 s for a completion"
        assert found.errors["died"] == "its process died: signal 9, Killed"
        assert found.errors["not_finite"] == "it returned nan (a float) for a completion"
        assert found.errors["not_a_number"] == "it returned '1.0' (a str) for a completion"
        assert pool.score([answer("3"), answer("4")])["it"].scores_N.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("function", "failure", "words"),
    [
        ("returns_none", "not_a_number", "it returned None"),
        ("returns_text", "not_a_number", "it returned 'good' (a str), not a list of 1 numbers"),
        ("returns_number", "wrong_count", "it returned 1.0 (a float), not a list of 1 numbers"),
        ("returns_mapping", "wrong_count", "(a dict), not a list"),
        ("returns_too_few", "wrong_count", "it returned 0 numbers for 1 completions"),
        ("returns_too_many", "wrong_count", "it returned more numbers for 1 completions"),
        ("returns_endless", "wrong_count", "it returned more numbers for 1 completions"),
    ],
)
def test_what_is_no_list_of_as_many_numbers(function, failure, words):
    found = score(function, [answer("a"), answer("b")], failure_score=-1.0)
    assert found.scores_N.tolist() == [-1.0, -1.0]
    assert found.counts == counts(**{failure: 2})
    assert words in found.errors[failure]


@pytest.mark.slow
@pytest.mark.alone
def test_a_call_that_fails_as_a_whole_is_repeated_answer_by_answer():
    found = score(
        "wrong_when_many",
        [answer(text) for text in ("1", "2", "bad", "4", "5")],
        completions_per_call=4,
        failure_score=-1.0,
    )
    assert found.scores_N.tolist() == [1.0, 2.0, -1.0, 4.0, 5.0]
    assert found.counts == counts(raised=1) and list(found.errors) == ["raised"]
    assert found.errors["raised"].startswith("ValueError: not these (")
    found = score(
        "by_text",
        [answer(text) for text in ("1", "kill", "3", "hang", "nan", "6")],
        completions_per_call=3,
        seconds=1.5,
    )
    assert found.scores_N.tolist() == [1.0, 0.0, 3.0, 0.0, 0.0, 6.0]
    assert found.counts == counts(died=1, timed_out=1, not_finite=1)


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("raises_in_a_library", "return [json.loads(answer.text) for answer in answers]"),
        ("called", 'raise ValueError("called")'),
    ],
)
def test_an_error_names_the_place_in_the_users_own_code(function, line):
    error = score(function, [answer("no JSON")]).errors["raised"]
    path, number = re.fullmatch(r".* \((.*):(\d+)\)", error).groups()
    assert pathlib.Path(path).read_text().splitlines()[int(number) - 1].strip() == line


@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").exists(), reason="needs /proc")
def test_what_a_function_writes_to_its_socket_is_never_run(tmp_path):
    """Nor does it cost an answer its score."""
    file = tmp_path / "ran"
    found = score("writes_everywhere", [answer(file=str(file)) for _ in range(3)])
    assert found.scores_N.tolist() == [1.0] * 3 and found.counts == counts()
    assert not file.exists()
    found = score("floods", [answer()], seconds=0.5)
    assert found.counts == counts(timed_out=1)
    found = score("closes_everything", [answer()])
    assert found.counts == counts(died=1)


def test_every_value_of_a_row_arrives_as_it_was():
    assert score("row_is_whole", [answer(**reward_cases.ROW)]).scores_N.tolist() == [1.0]
    with pytest.raises(
        InputError, match="A row of the data, or its prompt, holds a object, which cannot be given"
    ):
        score("length", [answer(odd=[object()])])
    with pytest.raises(InputError, match="The arguments of reward_cases:scaled holds a set"):
        reward("scaled", arguments={"by": {1}})


def test_a_process_killed_from_outside_loses_nothing(tmp_path):
    """The kernel may end a process for the memory that another one took: its answer is given out once more."""
    found = score("killed_once", [answer(folder=str(tmp_path)) for _ in range(3)], workers=2)
    assert (tmp_path / "killed").exists()
    assert found.scores_N.tolist() == [2.0] * 3 and found.counts == counts()


def test_a_process_killed_between_batches_is_replaced():
    with RewardWorkers({"pid": reward("own_pid")}, workers=1) as pool:
        first = int(pool.score([answer()])["pid"].scores_N[0])
        os.kill(first, signal.SIGKILL)
        found = pool.score([answer()])["pid"]
        assert found.counts == counts() and int(found.scores_N[0]) != first
        pool.close()
        assert pool.score([answer()])["pid"].counts == counts(), "a closed pool starts again"


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def gone(pid: int) -> bool:
    for _ in range(100):
        if not is_running(pid):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_a_function_started_ends_with_it(tmp_path):
    file = tmp_path / "pid"
    found = score("starts_a_child_and_hangs", [answer(file=str(file))], seconds=2.0)
    assert found.counts == counts(timed_out=1)
    assert gone(int(file.read_text()))


PROGRAM = """
import sys
import jax  # the main module imports it; the workers must not
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.workers import PythonReward, RewardWorkers

pool = RewardWorkers({name: PythonReward(f"reward_cases:{name}", seconds=600.0) for name in sys.argv[1:]}, workers=1)
found = pool.score([Completion("", (), "hang", (), "stop", {})])
print({name: scores.scores_N.tolist() for name, scores in found.items()}, "jax" in sys.modules, flush=True)
"""


def start(program, *names):
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{pathlib.Path(__file__).parent}"}
    return subprocess.Popen(
        [sys.executable, program, *names],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def test_workers_import_neither_jax_nor_the_main_module(tmp_path):
    """The program has no `if __name__ == "__main__"`, and it does not close its workers."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    out, err = start(program, "jax_is_loaded", "prints").communicate(timeout=120)
    assert out == "{'jax_is_loaded': [0.0], 'prints': [0.0]} True\n", err
    assert "a line on stdout" in err, "what a function prints is no part of the program's output"


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Even when a function is running that does not return."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with start(program, "by_text") as process:
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        worker = ""
        for _ in range(600):
            worker = children.read_text()
            if worker:
                break
            time.sleep(0.1)
        time.sleep(0.5)
        assert is_running(int(worker))
        process.kill()
    assert gone(int(worker))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("reward_cases:absent", "The module reward_cases has no absent"),
        ("reward_cases:double.absent", "has no double.absent"),
        ("reward_cases:number", "reward_cases:number is a int, not a reward function"),
        ("absent_rewards:length", "there is no absent_rewards"),
        ("posttrain_jax.absent:length", "there is no posttrain_jax.absent"),
        ("broken_rewards:length", "cannot be imported (RuntimeError: the lexicon is damaged)"),
        (
            "reward_cases:scaled",
            "cannot be called with (completions): TypeError: missing a required",
        ),
        ("reward_cases:cannot_be_used", "cannot be used: The file of words is missing; write it."),
        ("reward_cases:dies_at_once", "do not start (it exited with 9"),
    ],
)
def test_a_function_that_cannot_be_used_is_said_at_the_start(path, words):
    with pytest.raises(InputError) as caught:
        RewardWorkers({"it": PythonReward(path)}, workers=1)
    message = str(caught.value)
    assert words in message and "\n" not in message


def test_arguments_that_a_function_does_not_take():
    with pytest.raises(InputError, match=r"cannot be called with \(completions, limit=\.\.\.\)"):
        RewardWorkers({"it": reward("length", arguments={"limit": 1})}, workers=1)


def test_a_function_of_an_earlier_version_is_told_the_new_name(tmp_path, monkeypatch):
    (tmp_path / "old_rewards.py").write_text("from posttrain_jax.rewards.answer import Answer\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"old_rewards:f imports .*rewards\.completion import Completion"):
        load_function("old_rewards:f", {})


def test_a_module_that_takes_too_long_to_import(tmp_path, monkeypatch):
    (tmp_path / "endless_rewards.py").write_text("import time\ntime.sleep(3600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="it was not ready after 0.5 s"):
        RewardWorkers({"it": PythonReward("endless_rewards:it")}, workers=1, start_seconds=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "length"}, "'length' names no reward function; write module:function"),
        ({"path": "my module:f"}, "names no reward function"),
        ({"path": "a:b:c"}, "names no reward function"),
        ({"path": ":f"}, "names no reward function"),
        ({"path": "m:f", "seconds": 0.0}, "time limit of m:f is 0.0 s"),
        ({"path": "m:f", "seconds": float("nan")}, "time limit"),
        ({"path": "m:f", "completions_per_call": 0}, "gets 0 completions per call"),
        ({"path": "m:f", "failure_score": float("inf")}, "failure score of m:f is inf"),
        ({"path": "m:f", "failure_score": 1e39}, "failure score of m:f is 1e"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(InputError, match=words):
        PythonReward(**settings)


def test_no_workers():
    with pytest.raises(InputError, match="0 reward workers"):
        RewardWorkers({}, workers=0)
