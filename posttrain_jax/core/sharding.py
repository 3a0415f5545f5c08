"""Meshes, the one table of how every array is split over them, and the one helper that jits a step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import check, setting
from posttrain_jax.core.trees import leaf_path
from posttrain_jax.core.types import Array, Batch, PreferenceBatch, PyTree

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# How a parameter is split: the first row whose pattern ends the leaf's path wins; one mesh axis (or None) per
# array axis. Optimizer state mirrors its parameter. An axis that does not divide evenly is not split.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"head/kernel", ("tensor", "fsdp")),
    (r"attn/(q|k|v)/kernel", (None, "fsdp", "tensor")),
    (r"attn/o/kernel", (None, "tensor", "fsdp")),
    (r"mlp/(gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"mlp/down/kernel", (None, "tensor", "fsdp")),
    (r"(attn/(q|k|v)|mlp/(gate|up))/bias", (None, "tensor")),
    (r"(attn/(q|k|v)|mlp/(gate|up))/lora_a", (None, "fsdp", None)),
    (r"(attn/(q|k|v)|mlp/(gate|up))/lora_b", (None, None, "tensor")),
    (r"(attn/o|mlp/down)/lora_a", (None, "tensor", None)),
    (r"(attn/o|mlp/down)/lora_b", (None, None, "fsdp")),
)

# Without this XLA leaves out some roundings to bfloat16, and other ones where a gradient is taken: log-probabilities
# then differ between a forward pass and a train step on the same weights, and DPO's policy differs from its reference
# before step 1.
OPTIONS: dict[str, bool | str] = {"xla_allow_excess_precision": False}
# With this XLA's CPU backend computes large products with Eigen instead of YNNPACK: 4 % of an SFT step, 3 % with LoRA.
CPU_OPTIONS = {**OPTIONS, "xla_cpu_experimental_ynn_fusion_type": ""}


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """The section `mesh` of a config: how the devices are laid out; at most one size is -1."""

    data: int = setting(-1, "devices that split rows; -1 = those that are left", minimum=-1)
    fsdp: int = setting(1, "devices that split rows, and parameters too; -1 = as above", minimum=-1)
    tensor: int = setting(1, "devices that split each layer's computation; -1 = as above", minimum=-1)

    def __post_init__(self) -> None:
        check(self, "mesh")
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise InputError(f"The mesh {sizes} is not valid: sizes are positive, and at most one is -1.")


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices of all processes with axes data, fsdp, tensor; at most one may be -1 (all other devices).

    `tensor` is innermost, so that its devices are neighbors.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.device_count()
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise InputError(f"The mesh {sizes} is not valid: sizes are positive, and at most one is -1.")
    if unknown:
        known = int(np.prod([size for size in sizes.values() if size != -1]))
        sizes[unknown[0]] = devices // known
    if int(np.prod(list(sizes.values()))) != devices:
        raise InputError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {sizes['data']} x {sizes['fsdp']} x {sizes['tensor']} does "
            f"not equal the {devices} device(s) of this run; set one of them to -1 to take what is left."
        )
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=jax.devices()
    )


def ambient_mesh() -> AbstractMesh | None:
    """The mesh that the enclosing `jit_step` traces under, or None where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def tensor_axis(size: int, mesh: Mesh | AbstractMesh) -> str | None:
    """The tensor axis where it divides `size`; else None: every device holds all of it."""
    return "tensor" if size % mesh.shape["tensor"] == 0 else None


def constrain_activations(x_BTD: Array) -> Array:
    """Keeps activations split over rows (data and fsdp) and replicated over tensor; does nothing without a mesh."""
    if ambient_mesh() is None:
        return x_BTD
    return jax.lax.with_sharding_constraint(x_BTD, P(BATCH_AXES, *(None,) * (x_BTD.ndim - 1)))


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """How the leaf at `path` is split on `mesh`, from RULES; a scalar or unknown leaf is replicated.

    Leaves below `members` are stacked, one for each model of an ensemble; that axis is not split.
    """
    if "members/" in path and shape:
        return P(None, *partition_spec(path.split("members/", 1)[1], shape[1:], mesh))
    for pattern, axes in RULES:
        if re.search(f"(^|/){pattern}$", path) and len(axes) == len(shape):
            fits = (
                axis if axis is not None and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape, strict=True)
            )
            return P(*fits)
    return P()


def tree_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every leaf of a tree of arrays (or shapes): parameters, optimizer state, TrainState."""

    def one(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(leaf_path(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Micro-batched rows `[M, B, ...]`: rows over data and fsdp."""
    return NamedSharding(mesh, P(None, BATCH_AXES, None))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def shard_multiple(rows: int, mesh: Mesh | None) -> int:
    """`rows`, rounded up to a multiple of the devices that rows are split over (mesh.data x mesh.fsdp)."""
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // shards) * shards


def host_data_shards(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process loads: (index, count).

    Raises:
      InputError: the tensor axis crosses processes, so that two processes would have to load the same rows.
    """
    grid = mesh.devices
    rows_per_process: dict[int, set[int]] = {}
    flat = grid.reshape(-1, grid.shape[-1])
    for row, devices in enumerate(flat):
        owners = {device.process_index for device in devices}
        if len(owners) > 1:
            raise InputError(
                "mesh.tensor must fit within one process; make it smaller or use mesh.fsdp instead."
            )
        rows_per_process.setdefault(owners.pop(), set()).add(row)
    return sorted(rows_per_process).index(jax.process_index()), len(rows_per_process)


RowBatch = TypeVar("RowBatch", Batch, PreferenceBatch)


def put_batch(
    arrays: dict[str, np.ndarray],
    mesh: Mesh,
    micro_batches: int,
    kind: type[RowBatch] = Batch,  # type: ignore[assignment]
) -> RowBatch:
    """This process's rows `[rows, ...]` as its part of the global `[M, B, ...]` batch on the devices."""
    sharding = batch_sharding(mesh)

    def put(rows: np.ndarray) -> Array:
        split = rows.reshape(micro_batches, rows.shape[0] // micro_batches, rows.shape[1])
        return jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(split))

    return kind(**{name: put(rows) for name, rows in arrays.items()})


def jit_step(
    step: Callable[..., Any],
    mesh: Mesh,
    *,
    in_shardings: tuple[Any, ...] | None,
    out_shardings: Any,
    donate: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Jits a pure step under `mesh`, with shardings and donated arguments. The only `jax.jit` of a train step.

    `step` may depend on the ambient mesh (`ambient_mesh`); the compiled step keeps it.
    """
    compiled = jax.jit(
        step,
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        donate_argnums=donate,
        compiler_options=CPU_OPTIONS if jax.default_backend() == "cpu" else OPTIONS,
    )

    def call(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return compiled(*arguments)

    call.lower = lambda *arguments: _lower_under(mesh, compiled, arguments)  # type: ignore[attr-defined]
    call.cache_size = compiled._cache_size  # type: ignore[attr-defined]
    return call


def _lower_under(mesh: Mesh, compiled: Any, arguments: tuple[Any, ...]) -> Any:
    with jax.set_mesh(mesh):
        return compiled.lower(*arguments)
