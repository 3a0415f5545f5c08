"""A real server process, and how it is asked, for the tests of launch.serve."""

from __future__ import annotations

import contextlib
import re
import signal
import socket

import httpx2
from entry_points import EntryPoint, environment

from posttrain_jax.models.io.tokenizer import stop_token_ids
from posttrain_jax.sampling.generate import GenerateOptions, generate

KEY = "a-key"
MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "Grüße"}]


@contextlib.contextmanager
def serving(*arguments, stop_with=signal.SIGTERM, **variables):
    """A server process and its base URL; it must end with 0 when it is told to."""
    process = EntryPoint("launch.serve", "--port=0", *arguments, env=environment(**variables))
    try:
        line = process.line()
        match = re.search(r"http://\S+", line)
        assert match, process.wait(5)
        yield process, match[0]
        process.send_signal(stop_with)
        ended = process.wait(60)
        assert (ended.code, ended.out) == (0, line), ended
        assert "Traceback" not in ended.err, ended.err
    finally:
        process.send_signal(signal.SIGKILL)


def post(base_url, path, body, key=KEY, **options):
    return httpx2.post(
        f"{base_url}/{path}", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60, **options
    )


def expected(loaded, prompt, max_new_tokens):
    """The greedy answer by the engine itself."""
    stops = stop_token_ids(loaded.config, loaded.tokenizer)
    options = GenerateOptions(max_new_tokens=max_new_tokens, stop_token_ids=stops)
    (sample,) = generate(loaded.model, loaded.params, [prompt], options)
    return sample


def text_of(loaded, sample):
    return loaded.tokenizer.decode(sample.tokens, skip_special_tokens=True)


def joined(stream):
    """The text of a streamed completion and why it ended."""
    chunks = [chunk.choices[0] for chunk in stream]
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason


def connected(base_url):
    host, port = re.search(r"//(.*):(\d+)", base_url).groups()
    return socket.create_connection((host, int(port)), timeout=20)
