"""What memory a run will need on each device, said before it starts, beside what there is.

The parts of the state are exact: their shapes and shardings are known before anything is made. What a step needs beside
them (activations, a reference, a KV cache) is estimated by whoever makes the `Task`, by a formula (`Task.memory`).
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping

import jax

from posttrain_jax.core.types import PyTree, TrainState

CGROUP = pathlib.Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def bytes_per_device(tree: PyTree) -> int:
    """Bytes that the fullest device holds of arrays (or shapes with shardings)."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize
        for length in shape:
            size *= length
        total += size
    return total


def needs(state: TrainState, others: Mapping[str, int]) -> dict[str, int]:
    """Bytes on each device, by part; parts of nothing are left out.

    Args:
      state: shapes with shardings.
      others: what a step needs beside the state, by name.
    """
    params = bytes_per_device(state.params)
    parts = {
        "parameters": params + bytes_per_device(state.frozen),
        "gradients": params,
        "optimizer": bytes_per_device(state.opt_state),
        "moving average": bytes_per_device(state.ema),
        **others,
    }
    return {name: size for name, size in parts.items() if size}


def statement(state: TrainState, others: Mapping[str, int], limit: int | None) -> list[str]:
    """The lines for a person: the parts, their sum, what there is, and a warning where that is less.

    Args:
      state, others: as in `needs`.
      limit: bytes that there are on each device; None = unknown.
    """
    parts = needs(state, others)
    total = sum(parts.values())
    of = "" if limit is None else f" of {_size(limit)}"
    text = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    lines = [f"Memory on each device, estimated: {_size(total)}{of} ({text})."]
    if limit is not None and total > limit:
        lines.append(
            "Warning: that is more than there is; lower train.micro_rows or data.max_length, set train.remat=full, "
            "train a LoRA adapter, or split over more devices (mesh.fsdp)."
        )
    return lines


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def device_memory() -> int | None:
    """Bytes that this process can have on each of its devices: the smallest limit of its accelerators. CPU devices
    share what the process has and what the host and its control group have left. None where nothing tells."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        known = [limit for limit in limits if limit]
        return min(known) if known else None
    left = [size for size in (_host_available(), cgroup_available(CGROUP)) if size is not None]
    return (min(left) + resident()) // len(devices) if left else None


def resident() -> int:
    """Bytes of memory that this process holds now; 0 where /proc does not tell."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _host_available() -> int | None:
    try:
        found = re.search(
            r"^MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE
        )
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def cgroup_available(root: pathlib.Path) -> int | None:
    """Bytes left to this process's control group (a container's limit), v2 or v1; None without a limit. File pages that
    the kernel can drop count as free."""
    for limit, usage, dropped in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((root / limit).read_text())
            used = int((root / usage).read_text())
            stat = (root / limit).with_name("memory.stat").read_text()
        except (OSError, ValueError):  # not there, or "max"
            continue
        reclaimable = re.search(rf"^{dropped} (\d+)$", stat, re.MULTILINE)
        if most < UNLIMITED:
            return max(most - used + (int(reclaimable[1]) if reclaimable else 0), 0)
    return None
