"""What every entry point does around its `main`: bad input becomes one sentence and exit code 2; caches are on."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

from launch.config import check_arguments
from posttrain_jax.errors import InputError


def run(main: Callable[[Sequence[str]], int | None], *, example: str) -> None:
    """Runs an absl main; never returns.

    Args:
      main: takes the arguments left after flags, returns an exit code (None = 0).
      example: a command line that works, shown by `--help` and after a mistake in the flags.
    """

    def guarded(argv: Sequence[str]) -> None:
        absl_logging.set_verbosity(absl_logging.ERROR)
        quiet_libraries()
        try:
            if len(argv) > 1:
                raise InputError(f"The argument {argv[1]!r} is not a flag; an example: {example}")
            code = main(argv) or 0
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = 2
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            where = f" ({error.filename})" if error.filename else ""
            print(
                f"error: {error.strerror}{where}; make room, or use another folder.",
                file=sys.stderr,
                flush=True,
            )
            code = 2
        except KeyboardInterrupt:
            code = 130
        sys.stdout.flush()
        sys.exit(code)

    sys.modules["__main__"].__doc__ = f"{sys.modules['__main__'].__doc__ or ''}\nExample:\n  {example}\n"
    app.run(guarded, flags_parser=lambda argv: _parse(argv, example))


def _parse(argv: Sequence[str], example: str) -> Sequence[str]:
    try:
        check_arguments(argv)
        return flags.FLAGS(list(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        print(f"error: {error}\nexample: {example}", file=sys.stderr, flush=True)
        sys.exit(2)


def quiet_libraries() -> None:
    """Libraries speak only when something is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    for name in ("orbax", "jax", "datasets", "transformers", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Orbax speaks through absl, and prints the trace of every thread of a save that then raises here as well.
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

    A program's independent all-reduces each hold a thread of XLA's pool in every device until all devices have come.
    With as many threads as devices two of them can wait for each other for ever.

    Raises:
      InputError: the cache's folder is a file.
    """
    import jax

    from posttrain_jax.assets import cache_root

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
