"""Signals that ask a run to end: each is noticed, and a second Ctrl-C ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from posttrain_jax.run.preemption import PreemptionHandler, handled_signals

TWICE = """
import os, signal
from posttrain_jax.run.preemption import PreemptionHandler
signal.signal(signal.SIGINT, signal.default_int_handler)
preemption = PreemptionHandler()
os.kill(os.getpid(), signal.SIGINT)
print(preemption.stop_after(1), flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("still there", flush=True)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_noticed_and_given_back(signum: signal.Signals, capfd: pytest.CaptureFixture[str]):
    before = signal.getsignal(signum)
    preemption = PreemptionHandler()
    assert not preemption.stop_after(1)
    os.kill(os.getpid(), signum)
    assert preemption.stop_after(2)
    preemption.close()
    assert signal.getsignal(signum) is before
    assert f"{signum.name}: the run saves after this step" in capfd.readouterr().out


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in handled_signals()
        preemption = PreemptionHandler()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not preemption.stop_after(1)
        preemption.close()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_the_process_at_once():
    ended = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGINT
    assert ended.stdout.splitlines()[-1] == "True"
    assert "still there" not in ended.stdout
