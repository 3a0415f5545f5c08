"""The folder of a run: its completed checkpoints, the check of their files, and the lock of the run that writes."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import jax
import numpy as np
from jax.experimental import multihost_utils

from posttrain_jax.core.errors import InputError

MANIFEST = "manifest.json"
ITEMS = ("params", "optimizer", "meta")
METRICS = "metrics"  # Orbax's own item; only where the best checkpoint is kept
COLLECTOR = "collector"  # arrays of the collector of batches, where it has some
LOCK = ".lock"


def is_workdir(path: Path) -> bool:
    """Whether a folder is a run's workdir: a resolved `config.json` beside `checkpoints/`."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def completed_steps(workdir: Path) -> list[int]:
    """Steps with a finished checkpoint, ascending. Folders still being written have another name."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if _is_step(entry.name) and entry.is_dir())


def _is_step(name: str) -> bool:
    """Whether a folder's name is a step as this code writes it: "7", not "07" or digits of other scripts."""
    return name.isascii() and name.isdigit() and (name == "0" or name[0] != "0")


def write_manifest(folder: Path, items: Sequence[str] = (*ITEMS, METRICS, COLLECTOR)) -> None:
    """Writes size and CRC-32 of every file of the items of a checkpoint."""
    sums = {name: list(_size_and_crc(folder / name)) for name in _files(folder, items)}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=0))


def damage(step_dir: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words, or None."""
    missing = [item for item in ITEMS if not (step_dir / item).is_dir()]
    if missing:
        return f"it lacks {', '.join(missing)}"
    return _differences(step_dir, ITEMS)


def frozen_damage(workdir: Path) -> str | None:
    """What is wrong with the files of the parameters that are not trained, in words, or None."""
    return _differences(workdir / "frozen", (".",))


def _differences(folder: Path, items: Sequence[str]) -> str | None:
    if not (folder / MANIFEST).is_file():
        return f"its {MANIFEST} is gone"
    try:
        sums = {
            name: (size, crc) for name, (size, crc) in json.loads((folder / MANIFEST).read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} is not what was written"
    for name, (size, crc) in sums.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is gone"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
        try:
            if _size_and_crc(path)[1] != crc:
                return f"the contents of its file {name} have changed"
        except OSError as error:
            return f"its file {name} cannot be read ({error.strerror})"
    unlisted = [name for name in _files(folder, items) if name not in sums and name != MANIFEST]
    return f"its {MANIFEST} does not name its file {unlisted[0]}" if unlisted else None


def _files(folder: Path, items: Sequence[str]) -> list[str]:
    files = (path for item in items for path in (folder / item).rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in files)


def _size_and_crc(path: Path) -> tuple[int, int]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return size, crc


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Locks a workdir for one run, all of whose processes call this together; two runs in it would ruin each other.

    The lock is the kernel's lock on a file (flock), which ends with the process that holds it; Linux passes it on to
    NFS servers. On a file system without such locks nothing is locked.

    Raises:
      InputError: another run holds it; names the host and the process.
    """
    holder = ""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            file = stack.enter_context((workdir / LOCK).open("a+"))
            holder = _lock_file(file)
        if decided_by_host0(bool(holder)):
            raise InputError(
                f"The workdir {workdir} is in use by {holder or 'another run'}; wait until that has ended (or stop "
                "it), or use another --workdir."
            )
        yield


def _lock_file(file: IO[str]) -> str:
    """Locks a file, writes this process into it and returns ""; or returns who holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read(200).strip() or "another run"
    except OSError:  # this file system has no locks
        return ""
    file.truncate(0)
    started = datetime.datetime.now().isoformat(" ", "seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")
    file.flush()
    return ""


def decided_by_host0(flag: bool) -> bool:
    """Process 0's `flag`, in every process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))
