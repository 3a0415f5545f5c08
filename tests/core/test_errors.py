"""What errors leave out."""

from __future__ import annotations

import pytest

from posttrain_jax.core.errors import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://h:8/v1, twice", "at http://h:8/v1, twice"),
        ("at https://anna:p@ss/w@h/v1 today", "at https://***@h/v1 today"),
        ("'http://token@h'", "'http://***@h'"),
        ("http://h/v1?api_key=a&b=c==&d= x", "http://h/v1?api_key=***&b=***&*** x"),
        ("http://h/v1?sk-123", "http://h/v1?***"),
        ("a@b.c?d=e and C:\\x", "a@b.c?d=e and C:\\x"),
    ],
)
def test_secrets_of_urls_are_left_out(text, shown):
    assert without_secrets(text) == shown
