"""Compiled programs are dropped before the kernel's limit of memory maps is reached."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import pytest

from posttrain_jax.core import memory_maps

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such a limit")


def compiled() -> tuple[object, int]:
    """A function with ten programs, and how many maps the process has with them."""
    double = jax.jit(lambda x: x * 2 + jnp.sin(x))
    for size in range(1, 11):
        double(jnp.ones(size)).block_until_ready()
    return double, memory_maps.count_maps()


def test_half_of_the_maps_is_the_most(monkeypatch, tmp_path):
    limit = tmp_path / "max_map_count"
    monkeypatch.setattr(memory_maps, "LIMIT", limit)
    monkeypatch.setattr(memory_maps, "_next_count", 0.0)
    double, maps = compiled()
    limit.write_text(f"{2 * maps + 200}\n")
    assert not memory_maps.make_room() and double._cache_size() == 10
    limit.write_text(f"{2 * maps - 2}\n")
    assert not memory_maps.make_room()  # it counted a moment ago
    monkeypatch.setattr(memory_maps, "_next_count", 0.0)
    assert memory_maps.make_room() and double._cache_size() == 0
    assert memory_maps.count_maps() < maps
    assert float(double(jnp.zeros(1))[0]) == 0.0


def test_nothing_is_dropped_where_the_system_has_no_such_limit(monkeypatch, tmp_path):
    for name in ("LIMIT", "MAPS"):
        with monkeypatch.context() as patch:
            patch.setattr(memory_maps, name, tmp_path / "missing")
            patch.setattr(memory_maps, "_next_count", 0.0)
            assert not memory_maps.make_room()
    assert memory_maps.most_maps() > 0
