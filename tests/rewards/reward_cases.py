"""Reward functions, good and bad, which the tests name as "reward_cases:function" and worker processes import."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

from posttrain_jax.core.errors import InputError


def length(answers):
    return [len(answer.text) for answer in answers]


def scaled(answers, *, by, plus=0.0):
    return [by * len(answer.text) + plus for answer in answers]


def everything(answers):
    """Proves that all of an answer arrives."""
    return [
        len(answer.prompt) + sum(answer.prompt_ids) + sum(answer.token_ids) + answer.row["n"]
        if answer.finish_reason == "stop"
        else -1.0
        for answer in answers
    ]


def slow_when_first(answers):
    """The first answers take longest, so that they are finished last."""
    for answer in answers:
        time.sleep(0.3 if answer.row["n"] == 0 else 0.0)
    return [answer.row["n"] for answer in answers]


def by_text(answers):
    """Does to each answer what its text says; a plain number is its score."""
    return [_one(answer.text) for answer in answers]


def _one(text):
    match text:
        case "raise":
            raise KeyError("no such column")
        case "exit":
            sys.exit(3)
        case "hang":
            time.sleep(3600)
        case "spin":
            while True:
                pass
        case "nan":
            return float("nan")
        case "inf":
            return float("-inf")
        case "huge":
            return 1e39
        case "huge int":
            return 10**400
        case "string":
            return "1.0"
        case "none":
            return None
        case "complex":
            return 1j
        case "list":
            return [1.0]
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "quit":
            os._exit(7)
        case "true":
            return True
        case "decimal":
            return decimal.Decimal("0.25")
    return float(text)


def returns_none(answers):
    return None


def returns_text(answers):
    return "good"


def returns_number(answers):
    return 1.0


def returns_mapping(answers):
    return dict.fromkeys(range(len(answers)), 1.0)


def returns_too_few(answers):
    return [1.0] * (len(answers) - 1)


def returns_too_many(answers):
    return (1.0 for _ in range(len(answers) + 1))


def returns_endless(answers):
    while True:
        yield 1.0


def wrong_when_many(answers):
    """Fails as a whole on several answers, and on the answer "bad" alone."""
    if len(answers) > 1 or answers[0].text == "bad":
        raise ValueError("not these")
    return [float(answers[0].text)]


def killed_once(answers):
    """Is killed over the first answer that it ever gets, as when memory runs out; not the second time."""
    for answer in answers:
        mark = pathlib.Path(answer.row["folder"]) / "killed"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return [2.0] * len(answers)


def own_pid(answers):
    return [os.getpid()] * len(answers)


def jax_is_loaded(answers):
    loaded = "jax" in sys.modules or "flax" in sys.modules
    return [float(loaded)] * len(answers)


def starts_a_child_and_hangs(answers):
    for answer in answers:
        child = subprocess.Popen(["sleep", "3600"])
        pathlib.Path(answer.row["file"]).write_text(str(child.pid))
        time.sleep(3600)
    return []


def prints(answers):
    for _ in answers:
        print("a line on stdout")
    return [0.0] * len(answers)


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.file),)


def writes_everywhere(answers):
    """Into every open descriptor: lengths of pickles, JSON, and pickles that run."""
    for answer in answers:
        bomb = pickle.dumps(Bomb(answer.row["file"]))
        junk = len(bomb).to_bytes(4, "big") + bomb + b'{"values": [9.0]}\n' + bytes(100) + b"\xff" * 8
        for number in descriptors():
            with contextlib.suppress(OSError):
                os.write(number, junk)
    return [1.0] * len(answers)


def floods(answers):
    while answers:
        for number in descriptors():
            with contextlib.suppress(OSError):
                os.write(number, bytes(1000))
    return []


def closes_everything(answers):
    if answers:
        os.closerange(3, 100)
    return [1.0] * len(answers)


def descriptors():
    return [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]


ROW = {
    "bytes": b"\x00\xff",
    "day": datetime.date(2024, 2, 29),
    "moment": datetime.datetime(2024, 2, 29, 12, 30, 1, 5, tzinfo=datetime.UTC),
    "time": datetime.time(1, 2, 3),
    "long": datetime.timedelta(days=-1, seconds=5, microseconds=7),
    "decimal": decimal.Decimal("0.10"),
    "numbers": [1, -2.5, True, None, 1e300, float("inf")],
    "deep": {"a": [{"$posttrain_jax": ["bytes", "x"]}], "é\ud800": "日本"},
    "keys": {1: "one", (2, "b"): "two", None: 3},
}


def row_is_whole(answers):
    return [float(repr(answer.row) == repr(ROW)) for answer in answers]


def raises_in_a_library(answers):
    return [json.loads(answer.text) for answer in answers]


class Called:
    def __call__(self, answers):
        raise ValueError("called")


called = Called()


def cannot_be_used(answers):
    raise InputError("The file of words is missing; write it.")


def dies_at_once(answers):
    os._exit(9)


class Scale:
    def __init__(self, by):
        self.by = by

    def score(self, answers):
        return [self.by * len(answer.text) for answer in answers]


double = Scale(2.0)
number = 4
