"""launch.serve at its limits: clients that hang up, full queues, signals, bad flags, and how it starts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time

import httpx2
import openai
import pytest
from entry_points import ROOT, environment
from server import KEY, post, serving
from tiny_model import save_tiny_model

from launch.serve import Options, check, listen, serve, start
from posttrain_jax.core.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """A model that can write for a long time."""
    return save_tiny_model(tmp_path_factory.mktemp("long") / "model", max_length=16384)


@pytest.fixture(scope="module")
def small_url(long_folder):
    """One slot, and room for one answer to wait."""
    flags = (f"--model={long_folder}", "--served_model_name=long", "--slots=1", "--max_waiting=1")
    with serving(*flags, "--max_model_len=16384", "--shutdown_seconds=1", POSTTRAIN_JAX_API_KEY=KEY) as (
        _,
        url,
    ):
        yield url


LONG = {"model": "long", "prompt": "Once", "max_tokens": 16000, "ignore_eos": True, "temperature": 1}


def health_becomes(base_url, seconds, *, running, waiting=0):
    """Whether so many answers are running and waiting soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        health = httpx2.get(f"{base_url.removesuffix('/v1')}/health").json()
        if health == {"status": "ok", "running": running, "waiting": waiting}:
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def beginning_of_stream(base_url, max_tokens):
    """The lines of a streamed answer after its first."""
    body = {**LONG, "max_tokens": max_tokens, "stream": True}
    with httpx2.stream("POST", f"{base_url}/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


def hang_up_in_stream(base_url):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.stream(
        "POST", f"{base_url}/completions", json={**LONG, "stream": True}, headers=headers
    ) as response:
        next(response.iter_lines())


def hang_up_while_waiting_for_the_whole(base_url):
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(
            f"{base_url}/completions", json=LONG, headers={"Authorization": f"Bearer {KEY}"}, timeout=0.5
        )


def hang_up_in_the_middle_of_the_body(base_url):
    host, port = re.search(r"//(.*):(\d+)", base_url).groups()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n"
        connection.sendall(f'{head}Content-Type: application/json\r\n\r\n{{"model":'.encode())


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    "hang_up",
    [hang_up_in_stream, hang_up_while_waiting_for_the_whole, hang_up_in_the_middle_of_the_body],
)
def test_a_client_that_hangs_up_gives_its_slot_back(small_url, hang_up):
    """16,000 tokens take a minute: the only slot is free long before they would have been written."""
    for _ in range(3):
        hang_up(small_url)
    assert health_becomes(small_url, 30, running=0)
    answer = post(small_url, "completions", {**LONG, "max_tokens": 4})
    assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.slow
@pytest.mark.alone
def test_a_full_queue_is_429_and_the_next_one_is_served(small_url):
    headers = {"Authorization": f"Bearer {KEY}"}
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(
                httpx2.stream(
                    "POST", f"{small_url}/completions", json={**LONG, "stream": True}, headers=headers
                )
            )
        answer = post(small_url, "completions", {**LONG, "max_tokens": 1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(answer.headers["retry-after"]) >= 1
        with openai.OpenAI(base_url=small_url, api_key=KEY, max_retries=0) as client:
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model="long", prompt="a", max_tokens=1)
    assert health_becomes(small_url, 30, running=0)
    assert post(small_url, "completions", {**LONG, "max_tokens": 1}).status_code == 200


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("stop_with", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_cuts_those_that_take_too_long(long_folder, stop_with):
    flags = (f"--model={long_folder}", "--served_model_name=long", "--shutdown_seconds=10")
    with (
        serving(*flags, "--max_model_len=16384", stop_with=stop_with) as (process, url),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        whole = pool.submit(post, url, "completions", LONG)
        assert health_becomes(url, 60, running=1)
        with beginning_of_stream(url, 16000) as cut, beginning_of_stream(url, 100) as short:
            process.send_signal(stop_with)
            *_, last, end = [line for line in short if line]
            assert end == "data: [DONE]"
            assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            *_, error, end = [line for line in cut if line]
            assert end == "data: [DONE]"
            assert "shutting down" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert whole.result().status_code == 503
        assert process.wait(30).code == 0


def test_a_signal_ends_the_start_also_while_it_compiles():
    """What compiles is in C++ and looks at no signal, as the hash of this test, which would take minutes."""
    script = (
        "import hashlib, launch.serve as serve\n"
        "with serve.ends_at_a_signal(0.2):\n"
        "    print('compiling', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)\n"
    )
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [sys.executable, "-c", f"import signal; signal.signal({number:d}, lambda *_: None)\n{script}"],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "compiling\n"
        process.send_signal(number)
        assert process.wait(timeout=10) == code
        process.stdout.close()


BAD = [
    ({"max_model_len": 1}, "--max_model_len=1 must be 0 or at least 2"),
    ({"slots": 0}, "--slots=0 must be at least 1"),
    ({"idle_seconds": 0}, "--idle_seconds=0 must be at least 1"),
    ({"port": 70000}, "between 0 and 65535"),
    ({"api_key": "ключ"}, "plain ASCII"),
    ({"host": "256.1.1.1"}, "cannot listen on --host=256.1.1.1"),
    ({"model": "no/such/thing"}, "no such file"),
    ({"max_model_len": 129}, "more than the model's context, 128"),
    ({"max_logprobs": 261}, "more than the vocabulary, 260"),
]


@pytest.mark.parametrize(("values", "words"), BAD)
def test_bad_flags_are_one_sentence(folder, values, words):
    def begin(options):
        check(options)
        serve(options)

    with pytest.raises(InputError, match=re.escape(words)):
        begin(Options(**{"model": str(folder), "port": 0, **values}))


def test_of_two_servers_that_start_at_once_on_a_port_the_later_one_is_refused():
    """Both bind it; only one can listen."""
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        options = Options("never/read", port=port)
        with listen("127.0.0.1", port) as second:
            start(first, options)
            with pytest.raises(
                InputError, match=rf"cannot listen on .* --port={port} \(Address already in use"
            ):
                start(second, options)


@pytest.mark.slow
@pytest.mark.alone
def test_a_base_model_completes_but_does_not_chat_and_an_open_address_is_warned_of(tmp_path):
    base = save_tiny_model(tmp_path / "base", chat=False)
    with serving(f"--model={base}", "--host=0.0.0.0") as (process, url):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert (
            post(url, "completions", {"model": str(base), "prompt": "a", "max_tokens": 1}).status_code == 200
        )
        body = {"model": str(base), "messages": [{"role": "user", "content": "a"}]}
        answer = post(url, "chat/completions", body)
        assert (answer.status_code, "no chat template" in answer.json()["error"]["message"]) == (400, True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60).err.startswith("warning: 0.0.0.0 can be reached")
