"""The memory statement: bytes of the fullest device, what a container has left, and the sentence that says both."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from contracts.tiny import LLAMA, make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.types import TrainState
from posttrain_jax.models.transformer import make_model
from posttrain_jax.run.memory import bytes_per_device, cgroup_available, device_memory, needs, statement
from posttrain_jax.wiring.memory import activation_bytes, cache_bytes


def state(*, ema: bool) -> TrainState:
    """1,024 x 64 float32 parameters, split over fsdp=4 of 8 devices: 64 KiB on each; Adam's two moments as well."""
    mesh = make_mesh(2, 4, 1)
    weights = jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return TrainState(
        step=scalar,
        params={"w": weights},
        frozen={},
        opt_state={"mu": weights, "nu": weights},
        ema={"w": weights} if ema else {},
        key=scalar,
        skipped=scalar,
        skipped_in_row=scalar,
    )


def test_the_parts_of_a_split_state_by_hand():
    part = 1024 * 64 * 4 // 4
    assert bytes_per_device(state(ema=False).params) == part
    assert needs(state(ema=True), {"activations": 7, "reference": 0}) == {
        "parameters": part,
        "gradients": part,
        "optimizer": 2 * part,
        "moving average": part,
        "activations": 7,
    }


def test_the_statement_warns_where_it_does_not_fit():
    """65,536 bytes x (1 + 1 + 2) are 0.26 MB, and with 1 GB of activations 1.00 GB."""
    (line,) = statement(state(ema=False), {}, None)
    assert line == (
        "Memory on each device, estimated: 0.26 MB (parameters 0.07 MB, gradients 0.07 MB, optimizer 0.13 MB)."
    )
    line, warning = statement(state(ema=False), {"activations": 10**9}, 5 * 10**8)
    assert line.startswith("Memory on each device, estimated: 1.00 GB of 0.50 GB (parameters 0.07 MB, ")
    assert warning.startswith("Warning: that is more than there is; lower train.micro_rows")
    assert len(statement(state(ema=False), {}, 10**9)) == 1


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 200\n"}, 500),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": ""}, None),
        ({"memory.max": "1000", "memory.current": "1700", "memory.stat": ""}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "400",
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 100\n",
            },
            700,
        ),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "4"}, None),
        ({}, None),
    ],
)
def test_what_a_control_group_has_left(files: dict[str, str], left: int | None, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_available(tmp_path) == left


def test_devices_of_the_host_share_its_memory():
    limit = device_memory()
    assert limit is not None and 1e6 < limit < 1e13


def test_activations_by_hand():
    """LLAMA of the tests: D 32, H K 64, G K 64, F 64, 2 layers, V 64; tensor=2 leaves 32 of H K, G K and F. So
    elementwise keeps 2 x 32 + 3 x 2 x 32 = 256 elements of a token and layer, "none" 8 x 32 + 4 x 32 + 4 x 32 + 5 x 32
    = 672. 8 rows of 16 on data=2, fsdp=2 are 32 tokens: 32 x (2 x 256 + 672) x 4 bytes, and 3 x 4 x (32 x 64 logits +
    32 x 32 of the hidden states)."""
    mesh = make_mesh(2, 2, 2)
    model = make_model(LLAMA, attention="xla", remat="elementwise")
    assert activation_bytes(model, mesh, rows=8, length=16) == 32 * (2 * 256 + 672) * 4 + 12 * (
        32 * 64 + 32 * 32
    )
    assert cache_bytes(model, mesh, rows=6, length=10) == 2 * 2 * 2 * 10 * 4 * 8 * 4
