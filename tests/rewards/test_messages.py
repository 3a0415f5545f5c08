"""Messages on a socket: whole, in order, and nothing but messages."""

from __future__ import annotations

import socket

import pytest

from posttrain_jax.rewards.messages import TOKEN_BYTES, Messages, as_json

TOKEN = bytes(range(TOKEN_BYTES))


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, Messages(theirs, TOKEN)


def test_messages_come_one_by_one_through_whatever_else_is_written(ends):
    ours, theirs = ends
    sender = Messages(ours, TOKEN)
    for number in range(3):
        ours.sendall(b"\x80\x04junk" * number + TOKEN[:-1])
        sender.send(as_json({"n": number, "text": "x" * 1000}, "it"))
    assert [theirs.next()["n"] for _ in range(3)] == [0, 1, 2]


def test_a_message_that_is_cut_into_is_no_message(ends):
    ours, theirs = ends
    ours.sendall(TOKEN + (9).to_bytes(8, "big") + b'{"n": 1junk')
    with pytest.raises(ValueError):
        theirs.read()


def test_a_length_that_no_message_has(ends):
    ours, theirs = ends
    ours.sendall(TOKEN + b"\xff" * 8)
    with pytest.raises(ValueError, match="a message of"):
        theirs.read()


def test_the_end_of_the_other_side(ends):
    ours, theirs = ends
    ours.close()
    with pytest.raises(EOFError):
        theirs.next()
