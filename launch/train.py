"""Trains a model as a config says: SFT, reward models, DPO, KTO, PPO, RLOO. Run again, it resumes in the workdir.

--config.KEY=VALUE changes a key of the config, such as --config.optim.lr=1e-6; --describe prints all of them.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from launch import config as config_flag
from launch import entry, processes, resume
from posttrain_jax.core.errors import InputError
from posttrain_jax.run.preemption import handled_signals

EXAMPLE = "python -m launch.train --config=configs/sft/smollm2_135m.py --workdir=runs/smollm2"

CONFIG = config_flag.define()
flags.declare_key_flag("config")
DESCRIBE = flags.DEFINE_bool("describe", False, "Prints every key of the config, and trains nothing.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; what is there is resumed.")
ALLOW_CHANGE = flags.DEFINE_list(
    "allow_change", [], "Config keys with which a run may go on changed, such as optim.lr,train.steps."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", 'HOST:PORT of process 0, for several processes; "auto" on a Cloud TPU pod.'
)
PROCESSES = flags.DEFINE_integer("processes", 1, "Number of processes, with --coordinator=HOST:PORT.")
PROCESS = flags.DEFINE_integer("process", 0, "This process's index, with --coordinator=HOST:PORT.")
CONNECT_SECONDS = flags.DEFINE_integer(
    "connect_seconds", 300, "How long a process waits for the others.", lower_bound=1
)


def main(argv: Sequence[str]) -> int:
    """Builds the task that the config names and trains it."""
    del argv
    if DESCRIBE.value and CONFIG.value is not None:
        print(config_flag.describe(CONFIG.value))
        return 0
    if WORKDIR.value is None or CONFIG.value is None:
        raise InputError(f"--config and --workdir are needed; an example: {EXAMPLE}")
    workdir = Path(WORKDIR.value).expanduser()
    several = COORDINATOR.value, PROCESSES.value, PROCESS.value
    processes.check(*several)
    if COORDINATOR.value:
        processes.connect(*several, seconds=CONNECT_SECONDS.value)
        # With "auto" each may be the first.
        with processes.exits_with_its_peers(is_first=PROCESS.value == 0):
            entry.set_up_jax()
            run(CONFIG.value, workdir, allowed=ALLOW_CHANGE.value)
        return 0
    for signum in handled_signals():
        if signum != signal.SIGINT:
            signal.signal(signum, _exit)
    entry.set_up_jax()
    run(CONFIG.value, workdir, allowed=ALLOW_CHANGE.value)
    return 0


def _exit(signum: int, frame: Any) -> None:
    """A signal before the training loop, which has handlers of its own: there is nothing to save yet."""
    raise SystemExit(0)


def run(config: ConfigDict, workdir: Path, *, allowed: Sequence[str] = ()) -> None:
    """Trains in this process; the workdir is made if it is not there.

    Args:
      config: the experiment.
      workdir: the run's folder.
      allowed: keys that may differ from those that the run was started with.

    Raises:
      InputError: anything wrong with config, model or data; another run is in the workdir.
    """
    from posttrain_jax.core.workdir import locked

    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The workdir {workdir} cannot be made: {error.strerror}.") from error
    with locked(workdir):
        _run(config, workdir, allowed)


def _run(config: ConfigDict, workdir: Path, allowed: Sequence[str]) -> None:
    import jax

    from posttrain_jax.core.workdir import completed_steps
    from posttrain_jax.run.loop import LoopOptions, train
    from posttrain_jax.wiring.algorithms import make_task, read_experiment

    experiment = read_experiment(config.to_dict())
    resume.check_allowed(config, allowed)
    resolved = resume.resolve(config)
    steps = completed_steps(workdir)
    first = jax.process_index() == 0
    changed = resume.changes(config, workdir, allowed) if steps else []
    if first and not steps:
        resume.write(resolved, workdir)
    options = LoopOptions(
        log=experiment.log,
        eval=experiment.eval,
        checkpoint=experiment.checkpoint,
        max_skipped=experiment.train.max_skipped,
        config=resolved,
    )
    task = make_task(experiment, workdir)
    if steps and steps[-1] > task.steps:
        raise InputError(
            f"The run in {workdir} has reached step {steps[-1]}, and train.steps is {task.steps} now; give more steps, "
            "or a new --workdir."
        )
    if first and steps:
        resume.write(resolved, workdir, step=steps[-1], changed=changed)
    (workdir / "summary.json").unlink(missing_ok=True)
    train(task, options, workdir)


if __name__ == "__main__":
    entry.run(main, example=EXAMPLE)
