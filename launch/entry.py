"""What every entry point does around its `main`: bad input becomes one sentence and exit code 2, libraries are quiet,
and the compilation cache is on."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from absl import app, flags
from absl import logging as absl_logging

from launch.config import Override, override, take_overrides
from posttrain_jax.core.errors import InputError, file_error, without_secrets

FOLDER_FLAGS = ("workdir", "out", "dir")
"""The flags by which entry points name the folder or file that they write."""


def run(main: Callable[[Sequence[str]], int | None], *, example: str, takes_arguments: bool = False) -> None:
    """Runs an absl main; never returns.

    Args:
      main: takes the arguments left after flags, returns an exit code (None = 0).
      example: a command line that works, shown by `--help` and after a mistake in the flags.
      takes_arguments: whether `main` takes arguments that are no flags; else they are refused.
    """

    def guarded(argv: Sequence[str]) -> None:
        absl_logging.set_verbosity(absl_logging.ERROR)
        quiet_libraries()
        try:
            if len(argv) > 1 and not takes_arguments:
                raise InputError(f"The argument {argv[1]!r} is not a flag; an example: {example}")
            code = main(argv) or 0
        except (InputError, OSError, KeyboardInterrupt) as error:
            exit_code = report_error(error)
            if exit_code is None:
                raise
            code = exit_code
        sys.stdout.flush()
        sys.exit(code)

    tolerate_closed_output()
    sys.modules["__main__"].__doc__ = f"{sys.modules['__main__'].__doc__ or ''}\nExample:\n  {example}\n"
    app.run(guarded, flags_parser=lambda argv: _parse(argv, example))


def report_error(error: BaseException) -> int | None:
    """Prints one line about an error that the user can fix and returns the exit code; None for any other error."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, InputError):
        print(f"error: {without_secrets(str(error))}", file=sys.stderr, flush=True)
        return 2
    if isinstance(error, OSError) and file_error(error) is error:
        file = error.filename2 or error.filename  # a rename has two names; the second is the new one
        where = f" ({file})" if file else ""
        print(
            f"error: {error.strerror}{where}; put that right, or use another folder.",
            file=sys.stderr,
            flush=True,
        )
        return 2
    return None


class _TolerantFile(io.FileIO):
    """A file descriptor that drops output whose reader is gone (`| head`, a closed terminal)."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def tolerate_closed_output() -> None:
    """Keeps a command alive when its standard output or error is closed: its results are in files."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # It is closed (`>&-`), and the next file to be opened would get its number, and what is printed.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = tolerant_stream(1, sys.stdout), tolerant_stream(2, sys.stderr)


def tolerant_stream(descriptor: int, stream: TextIO | None) -> io.TextIOWrapper:
    """A text stream on a descriptor that tolerates a reader that is gone; encoded as the stream that it replaces."""
    encoding, errors = (stream.encoding, stream.errors) if stream is not None else ("utf-8", "replace")
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    buffer = io.BufferedWriter(_TolerantFile(descriptor, "wb", closefd=False))
    return io.TextIOWrapper(buffer, encoding, errors, line_buffering=descriptor == 2 or os.isatty(descriptor))


def _parse(argv: Sequence[str], example: str) -> Sequence[str]:
    try:
        words, overrides = list(argv), list[Override]()
        if "config" in flags.FLAGS:
            words, overrides = take_overrides(flags.FLAGS.read_flags_from_files(words))
        left = flags.FLAGS(words)
        if overrides:
            flags.FLAGS["config"].value = override(flags.FLAGS["config"].value, overrides)
        check_folders()
        return left
    except InputError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        print(f"error: {without_secrets(str(error))}\nexample: {example}", file=sys.stderr, flush=True)
        sys.exit(2)


def check_folders() -> None:
    """Refuses an output folder without a name, or one that is not on this machine.

    Raises:
      InputError: --workdir= would be the current folder; --workdir=gs://... would be made here, as `gs:`.
    """
    for name in FOLDER_FLAGS:
        value = flags.FLAGS[name].value if name in flags.FLAGS else None
        if value is None:
            continue
        if not value.strip():
            raise InputError(f"--{name} is empty; give a folder (--{name}=. is the current one).")
        address = re.match(r"([A-Za-z][\w+.-]*):/", value)
        if address:
            raise InputError(
                f"--{name}={value} is an address, and files are written to folders of this machine alone; mount the "
                f"bucket (for gs://, with Cloud Storage FUSE) and give the folder where it is mounted."
            )


def quiet_libraries() -> None:
    """Silences libraries unless something is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    for name in ("orbax", "jax", "datasets", "transformers", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Orbax logs through absl, and prints the traceback of every thread of a failed save, which then raises here too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.filterwarnings("ignore", category=UserWarning)


def set_up_jax() -> None:
    """Turns on JAX's compilation cache on disk, so that a second run starts without compiling; and gives XLA threads
    enough for virtual CPU devices.

    In every device, each independent all-reduce of a program holds a thread of XLA's pool until all devices have
    reached it. With as many threads as devices, two all-reduces can wait for each other forever.

    Raises:
      InputError: the cache's folder is a file.
    """
    import jax

    from posttrain_jax.core.cache import cache_root

    virtual = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if virtual:
        os.environ.setdefault("NPROC", str(max(4 * int(virtual[1]), os.cpu_count() or 1)))
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", cache_root() / "compiled"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"The cache {folder} cannot be made ({error.strerror}); set POSTTRAIN_CACHE, or JAX_COMPILATION_CACHE_DIR, "
            "to a folder."
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
