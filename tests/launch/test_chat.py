"""launch.chat: through a pipe, in a terminal, and with the real SmolLM2."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from entry_points import ROOT, environment
from tiny_model import launch, save_tiny_model

from launch.chat import Chat, Interrupt, command
from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.io.tokenizer import stop_token_ids
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.generate import GenerateOptions, generate
from posttrain_jax.sampling.prompts import encode_chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder))


def make_chat(loaded, **options):
    return Chat(
        loaded,
        Sampling(),
        **{"system": "", "max_new_tokens": 5, "seed": 0, "options": ChatOptions(), **options},
    )


def expected(loaded, messages, max_new_tokens=5):
    (sample,) = generate(
        loaded.model,
        loaded.params,
        [encode_chat(loaded.tokenizer, messages)],
        GenerateOptions(max_new_tokens, stop_token_ids=stop_token_ids(loaded.config, loaded.tokenizer)),
    )
    return loaded.tokenizer.decode(sample.tokens, skip_special_tokens=True)


def test_turns_build_on_each_other_and_commands_change_them(loaded):
    chat = make_chat(loaded, system="S")
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    first = "".join(chat.complete("a", Interrupt()))
    assert first == expected(loaded, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "b"}]
    assert "".join(chat.complete("b", Interrupt())) == expected(loaded, messages)
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 2]

    command(chat, "/reset")
    assert chat.messages == messages[:1]
    command(chat, "/system  Be brief. ")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    command(chat, "/system")
    assert chat.messages == []
    command(chat, "/temperature 0.5")
    assert chat.sampling.temperature == 0.5
    for line, words in (
        ("/temperature hot", "needs a number"),
        ("/temperature -1", "temperature is -1"),
        ("/quti", "no command /quti"),
    ):
        with pytest.raises(InputError, match=words):
            command(chat, line)
    assert chat.sampling.temperature == 0.5


def test_an_interrupted_answer_stays_as_far_as_it_came(loaded):
    chat = make_chat(loaded, max_new_tokens=30)
    interrupt = Interrupt()
    pieces = []
    for piece in chat.complete("a", interrupt):
        pieces.append(piece)
        interrupt.pressed = len(pieces) == 2
    assert len(pieces) <= 3
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}


def test_a_conversation_that_fills_the_context_is_left_as_it_was(loaded):
    chat = make_chat(loaded)
    "".join(chat.complete("a", Interrupt()))
    before = list(chat.messages)
    with pytest.raises(InputError, match="leaves no room"):
        list(chat.complete("b" * 200, Interrupt()))
    assert chat.messages == before


def test_a_base_model_is_refused(tmp_path):
    base = load_model(str(save_tiny_model(tmp_path / "base", chat=False)))
    with pytest.raises(InputError, match="no chat template"):
        make_chat(base)


def test_a_pipe_gives_the_answers_and_nothing_else(folder, loaded):
    lines = "\n".join(["a", "", "/help", "/nonsense", "/reset", "/system S", "b", "/quit", "c"])
    done = launch("chat", f"--model={folder}", "--temperature=0", "--max_new_tokens=5", stdin=lines)
    assert done.returncode == 0, done.stderr
    first = expected(loaded, [{"role": "user", "content": "a"}])
    second = expected(loaded, [{"role": "system", "content": "S"}, {"role": "user", "content": "b"}])
    assert done.stdout == f"{first}\n{second}\n"
    assert "no command /nonsense" in done.stderr and "/temperature X" in done.stderr
    for arguments, words in (((), "--model is needed"), (("--model=no/such/thing",), "no such file")):
        done = launch("chat", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr and "Traceback" not in done.stderr


def test_a_pipe_that_is_not_utf8_is_refused(folder):
    """In a fresh interpreter as well: one whose locale is C reads its input in another way."""
    fresh = subprocess.run(
        [sys.executable, "-m", "launch.chat", f"--model={folder}"],
        cwd=ROOT,
        env=environment(LC_ALL="C"),
        input="Grüße\n".encode("latin-1"),
        capture_output=True,
        check=False,
    )
    forked = launch("chat", f"--model={folder}", stdin="Grüße\n".encode("latin-1"))
    for done, error in ((fresh, fresh.stderr.decode()), (forked, forked.stderr)):
        assert (done.returncode, len(done.stdout)) == (2, 0), error
        assert error == "error: the input is not UTF-8 text; convert it first (iconv -t UTF-8).\n"


class Terminal:
    """launch.chat with a terminal, as far as it can tell."""

    def __init__(self, *arguments: str) -> None:
        self._fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.chat", *arguments],
            cwd=ROOT,
            env=environment(TERM="dumb"),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
        )
        os.close(inner)
        self.seen = ""

    def until(self, text: str, seconds: float = 120) -> str:
        """Reads until `text` is there; returns what came up to it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._fd, 4096).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"it left after {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def press_until(self, text: str) -> None:
        """Presses Ctrl-C until `text` is there: between its prompt and its wait, `input` does not notice one."""
        for _ in range(60):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                self.until(text, seconds=2)
                return
        raise AssertionError(f"no {text!r} in {self.seen!r}")

    def type(self, line: str) -> None:
        """Types a line."""
        os.write(self._fd, f"{line}\n".encode())

    def close(self) -> None:
        """Ends it, whatever it does."""
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


@pytest.mark.slow
@pytest.mark.alone
def test_the_real_model_answers_and_ctrl_c_stops_the_answer_but_not_the_program(smollm2_gguf):
    terminal = Terminal(f"--model={smollm2_gguf}", "--temperature=0", "--max_new_tokens=2000")
    try:
        terminal.until("> ")
        terminal.press_until("leaves)")  # at the prompt: a hint
        terminal.type("Write a very long story about a cat, in twenty chapters.")
        terminal.until("cat, in twenty chapters.")
        terminal.until(" the ")  # the answer has begun
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("(stopped)", seconds=30)
        terminal.until("> ")
        terminal.type("/reset")
        terminal.until("> ")
        terminal.type("What is the capital of France?")
        terminal.until("Paris")
        terminal.until("> ")
        os.write(terminal._fd, b"\x04")  # Ctrl-D
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()


@pytest.mark.slow
@pytest.mark.alone
def test_the_real_model_through_pipe_and_file_says_paris_and_stops(smollm2_gguf, tmp_path):
    question = "What is the capital of France?"
    done = launch("chat", f"--model={smollm2_gguf}", "--temperature=0", stdin=f"{question}\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    prompts, out = tmp_path / "p.jsonl", tmp_path / "g.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n")
    done = launch("generate", f"--model={smollm2_gguf}", f"--prompts={prompts}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    row = json.loads(out.read_text())
    assert (row["text"], row["finish_reason"]) == ("The capital of France is Paris.", "stop")
