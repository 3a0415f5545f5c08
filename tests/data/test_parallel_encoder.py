"""Encoding on all cores: helpers in real processes give what one `Encoder` gives, and may end at any time."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.data import tokenized
from posttrain_jax.data.chat import Encoder, ParallelEncoder
from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.data.formats import Conversation, to_conversation
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer


def chat(number: int) -> Conversation:
    return to_conversation(
        {
            "messages": [
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": "word " * (number % 7) + f"Answer {number}."},
            ]
        }
    )


def rows(count: int) -> list[Conversation]:
    """Chats, texts, and every seventh a chat that is refused: it holds its own end of turn."""
    found = []
    for number in range(count):
        if number % 7 == 3:
            refused = {"role": "assistant", "content": "a<|im_end|>b"}
            messages = ({"role": "user", "content": "q"}, refused)
            found.append(Conversation(messages=messages, trained=(False, True)))
        else:
            found.append(to_conversation({"text": f"text {number}"}) if number % 3 == 0 else chat(number))
    return found


def wait_for(encoder: ParallelEncoder, helpers: int) -> None:
    until = time.monotonic() + 60
    while len(encoder.ready()) < helpers:
        assert time.monotonic() < until, "the helpers do not become ready"
        time.sleep(0.05)


def shown(results: list) -> list:
    """What can be compared."""
    return [
        (one.column, one.reason)
        if isinstance(one, Exception)
        else (one.tokens.tolist(), one.loss_mask.tolist())
        for one in results
    ]


def test_helpers_give_what_one_encoder_gives():
    """100 rows, 2, 1 and none, before there are helpers, with two, and after one was killed while it waited."""
    conversations = rows(100)
    want = shown(Encoder(byte_tokenizer()).encode(conversations))
    assert sum(isinstance(one[0], str) for one in want) == 14
    with ParallelEncoder(byte_tokenizer(), helpers=2, start_after=0.0) as encoder:
        assert shown(encoder.encode(conversations)) == want
        wait_for(encoder, 2)
        for count in (100, 2, 1, 0):
            assert shown(encoder.encode(conversations[:count])) == want[:count]
        processes = [helper.process for helper in encoder.ready()]
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert shown(encoder.encode(conversations)) == want
        assert len(encoder.ready()) == 1
        assert shown(encoder.encode(conversations)) == want
    assert [process.wait(10) is not None for process in processes] == [True, True]


def test_a_template_that_cannot_be_trained_on_is_said_by_a_helper_too():
    """The text comes first and is this process's; the chat is the helper's."""
    broken = ChatOptions(template="{% for m in messages %}{{ m.role }}{% endfor %}")
    text = to_conversation({"text": "t"})
    with pytest.raises(InputError) as alone:
        Encoder(byte_tokenizer(), chat=broken).encode([chat(0)])
    with ParallelEncoder(byte_tokenizer(), chat=broken, helpers=1, start_after=0.0) as encoder:
        encoder.encode([text])
        wait_for(encoder, 1)
        with pytest.raises(InputError) as apart:
            encoder.encode([text, chat(0)])
    assert str(apart.value) == str(alone.value)


def test_small_files_start_no_processes_and_show_no_bar(tmp_path, capfd):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(50)))
    with ParallelEncoder(byte_tokenizer()) as encoder:
        encoder.encode(rows(50))
        assert encoder.ready() == []
    tokenized.build(str(path), byte_tokenizer(), cache_dir=tmp_path)
    assert capfd.readouterr().err == ""


def test_what_takes_long_has_a_bar_on_stderr(tmp_path, capfd, monkeypatch):
    """With the number of rows, for JSON Lines; none where another process of the run shows it."""
    monkeypatch.setattr(tokenized, "_SILENT_SECONDS", 0.0)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(50)))
    data = tokenized.build(str(path), byte_tokenizer(), cache_dir=tmp_path / "first")
    shown_bar = capfd.readouterr()
    assert "tokenizing rows.jsonl" in shown_bar.err and "/50" in shown_bar.err and shown_bar.out == ""
    silent = tokenized.TokenizeOptions(progress=False)
    again = tokenized.build(str(path), byte_tokenizer(), silent, cache_dir=tmp_path / "second")
    assert capfd.readouterr().err == ""
    np.testing.assert_array_equal(data.sources[0].store.tokens, again.sources[0].store.tokens)
