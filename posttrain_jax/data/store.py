"""Tokenized sequences on disk: one folder of .npy files per data source, memory-mapped back.

    tokens.npy     int32 [N]   all sequences, one after another
    loss_mask.npy  bool  [N]   True where the token is trained
    offsets.npy    int64 [S+1] sequence s is tokens[offsets[s]:offsets[s + 1]]
    files.npy      int32 [S]   which of meta["files"] the sequence's row came from
    lines.npy      int64 [S]   its line (or number) in that file
    meta.json                  file names, the report, a hash of the sequences
    rejected.jsonl             bad rows with their reasons
    sha256.json                a hash of every other file, checked when the folder is read

A folder is written under a temporary name and renamed when it is complete, so that a reader sees all of it or
nothing, and of two processes that build the same folder one wins and both read the winner's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

_SUMS = "sha256.json"
_ARRAYS = {
    "tokens": np.int32,
    "loss_mask": np.bool_,
    "offsets": np.int64,
    "files": np.int32,
    "lines": np.int64,
}


@dataclasses.dataclass(frozen=True)
class StoredSequences:
    """What `read_store` maps back; see the module's docstring for the arrays."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    files: np.ndarray
    lines: np.ndarray
    meta: dict[str, Any]


class StoreWriter:
    """Appends sequences to the files of a folder, holding only one chunk in memory. Use it as a context manager."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._files = {name: (folder / f"{name}.npy").open("w+b") for name in _ARRAYS}
        self._counts = dict.fromkeys(_ARRAYS, 0)
        self._sha = hashlib.sha256()
        for name in _ARRAYS:
            self._header(name)
        self._append("offsets", np.zeros(1, np.int64))

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, file in self._files.items():
            if kind is None:
                file.seek(0)
                self._header(name)
                file.flush()
                os.fsync(file.fileno())
            file.close()

    def append(
        self,
        tokens: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        files: Sequence[int],
        lines: Sequence[int],
    ) -> None:
        """Appends some sequences with the file index and line of each."""
        if not tokens:
            return
        for sequence, mask in zip(tokens, masks, strict=True):
            self._sha.update(len(sequence).to_bytes(8, "little"))
            self._sha.update(np.ascontiguousarray(sequence, np.int32).tobytes())
            self._sha.update(np.ascontiguousarray(mask, np.bool_).tobytes())
        ends = self._counts["tokens"] + np.cumsum([len(sequence) for sequence in tokens])
        self._append("tokens", np.concatenate(tokens))
        self._append("loss_mask", np.concatenate(masks))
        self._append("offsets", ends)
        self._append("files", np.asarray(files))
        self._append("lines", np.asarray(lines))

    def sha256(self) -> str:
        """A hash of all sequences and masks so far, in order."""
        return self._sha.hexdigest()

    def _append(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values, _ARRAYS[name]).tobytes())
        self._counts[name] += len(values)

    def _header(self, name: str) -> None:
        # NumPy pads the header so that a one-dimensional array can grow without moving its data.
        np.lib.format.write_array_header_1_0(
            self._files[name],
            {
                "descr": np.lib.format.dtype_to_descr(np.dtype(_ARRAYS[name])),
                "fortran_order": False,
                "shape": (self._counts[name],),
            },
        )


def read_store(folder: pathlib.Path) -> StoredSequences | None:
    """Maps a folder back into memory; None when it is not there, or (which is said) is not as it was written."""
    if not folder.exists():
        return None
    problem = _damage(folder)
    if problem is not None:
        log.warning("The cache %s is not as it was written (%s); it is made again.", folder, problem)
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {name: _map(folder / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()}
    except (OSError, ValueError):
        return None
    store = StoredSequences(**arrays, meta=meta)
    sequences = len(store.lines)
    whole = (
        len(store.offsets) == sequences + 1
        and len(store.files) == sequences
        and len(store.tokens) == len(store.loss_mask) == store.offsets[-1]
    )
    return store if whole else None


def _damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the files of a folder, in words, or None.

    Every start reads all of them for it: 0.65 GiB/s on one core, so a second for each 130 million tokens.
    """
    try:
        sums = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
        files = _sums(folder)
    except (OSError, ValueError, RecursionError) as error:
        return f"{_SUMS}: {error}"
    if not isinstance(sums, dict) or sums.keys() != files.keys():
        return "other files"
    wrong = [name for name, digest in files.items() if sums[name] != digest]
    return f"{wrong[0]} has changed" if wrong else None


def _sums(folder: pathlib.Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != _SUMS:
            with path.open("rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _map(path: pathlib.Path, dtype: type) -> np.ndarray:
    array = (
        np.lib.format.open_memmap(path, mode="r") if _holds_data(path) else np.load(path, allow_pickle=False)
    )
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{path} holds {array.dtype} of rank {array.ndim}")
    return array


def _holds_data(path: pathlib.Path) -> bool:
    """An empty array cannot be memory-mapped."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return shape != (0,)


@contextlib.contextmanager
def publish(
    folder: pathlib.Path, *, read: Callable[[pathlib.Path], object] = read_store
) -> Iterator[pathlib.Path]:
    """Gives a new folder to write into and renames it to `folder`; one that another process made first is kept, if
    `read` does not say None of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        (scratch / _SUMS).write_text(json.dumps(_sums(scratch)), encoding="utf-8")
        if folder.exists() and read(folder) is None:
            broken = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-broken-", dir=folder.parent))
            with contextlib.suppress(OSError):  # another process may have moved it away first
                os.rename(folder, broken / "was")
            shutil.rmtree(broken, ignore_errors=True)
        try:
            os.rename(scratch, folder)
        except OSError:
            if read(folder) is None:
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
