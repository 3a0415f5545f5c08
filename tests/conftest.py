"""Every test runs on the CPU as 8 virtual devices, offline, with rank promotion an error."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import signal
from collections.abc import Iterator

# These are read when jax, transformers or a BLAS is first imported, so they come before the imports below.
_FLAGS = os.environ.get("XLA_FLAGS", "")
if os.environ.get("COMPILE") == "fast":
    # Most tests compile much and compute little: what the compiler does for speed takes longer than it saves.
    _FLAGS += " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jax").startswith("0.10."):  # later ones have no other emitters
        _FLAGS += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = _FLAGS.strip()
if "xla_force_host_platform_device_count" not in _FLAGS:
    # On a busy machine eight devices on two cores may wait for each other longer than XLA's 40 seconds; then it aborts.
    _PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
    os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8 {_PATIENCE}".strip()
    # Threads of XLA's pools: each device's part of each all-reduce that is under way holds one, and with too few the
    # last part of one may wait for ever. They cost nothing.
    os.environ["NPROC"] = "128"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.demo import assets

jax.config.update("jax_numpy_rank_promotion", "raise")
# The pools are made here; processes that tests start, on one device mostly, have pools of their own size.
jax.local_devices()
os.environ.pop("NPROC", None)


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept between runs, in pytest's cache folder (keyed by program and flags). Ctrl-C and SIGHUP
    work, in the processes that tests start too: a shell's background job, such as CI may be, ignores them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    folder = config.rootpath / ".pytest_cache" / "xla" / jax.__version__
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first; within each group the order of the files is kept."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Every compiled program on the CPU maps pages of its own; a process may have 65,530 maps, and dies of more."""
    yield
    jax.clear_caches()


def _asset(name: str) -> pathlib.Path:
    try:
        return assets.fetch(name, quiet=True)
    except InputError as error:
        # Without the assets a checkout can still be worked on; CI must never pass by skipping.
        if os.environ.get("CI"):
            raise
        pytest.skip(f"asset {name} is not in the cache and cannot be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """SmolLM2-135M-Instruct, Q4_1, with its tokenizer and chat template."""
    return _asset("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma_gguf() -> pathlib.Path:
    """Gemma-3-270M base: no chat template."""
    return _asset("gemma-3-270m")


@pytest.fixture(scope="session")
def alpaca_path() -> pathlib.Path:
    """999 rows with the columns instruction, input, output."""
    return _asset("alpaca_en_demo")


@pytest.fixture(scope="session")
def dpo_en_demo() -> pathlib.Path:
    """300 real preference pairs."""
    return _asset("dpo_en_demo")


@pytest.fixture(scope="session")
def demo_path():
    """A function from the name of an asset to its path."""
    return _asset
