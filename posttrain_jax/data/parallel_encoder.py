"""Conversations to tokens on all cores: an `Encoder` here, and one in each of some helper processes.

Rendering a chat and finding its turns is Python, so threads do not help. The helpers are started when encoding has
taken some seconds, for a small file is done before they are ready, and each takes its share of every list; results are
those of one `Encoder`, in order. A helper that ends (out of memory, say) leaves its share to this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat import Encoded, Encoder
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions
from posttrain_jax.data.formats import Conversation
from posttrain_jax.data.rows import RowError

START_AFTER = 3.0
"""Seconds of encoding before helpers are started."""

MOST_HELPERS = 15
"""Reading the rows and writing the tokens stay in this process, and are a sixth of the work."""

_START = "from posttrain_jax.data.parallel_encoder import main; main({descriptor})"


@dataclasses.dataclass(eq=False)
class _Helper:
    process: subprocess.Popen
    connection: Connection
    ready: bool = False


class ParallelEncoder:
    """`Encoder.encode` on all cores; use it in a `with` block.

    Args:
      tokenizer, train_on, chat: as `Encoder`.
      helpers: processes beside this one.
      start_after: seconds of encoding before they are started.

    Raises InputError as `Encoder` does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_on: str = "all_turns",
        chat: ChatOptions = DEFAULT_CHAT,
        helpers: int = min((os.cpu_count() or 1) - 1, MOST_HELPERS),
        start_after: float = START_AFTER,
    ) -> None:
        self._encoder = Encoder(tokenizer, train_on=train_on, chat=chat)
        self.has_template = self._encoder.has_template
        self._arguments = (tokenizer, train_on, chat)
        self._count = helpers
        self._seconds_left = start_after
        self._helpers: list[_Helper] = []

    def __enter__(self) -> ParallelEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._helpers:
            self._end(self._helpers[0])

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | RowError]:
        """One Encoded, or the RowError that says why there is none, for each conversation."""
        helpers = self.ready()
        share = -(-len(conversations) // (len(helpers) + 1))
        parts = [conversations[first : first + share] for first in range(0, len(conversations), share or 1)]
        for helper, part in zip(helpers, parts[1:], strict=False):
            _send(helper, part)
        started = time.monotonic()
        results = self._encoder.encode(parts[0]) if parts else []
        if self._count and not self._helpers:
            self._seconds_left -= time.monotonic() - started
            if self._seconds_left <= 0:
                self._start()
        for helper, part in zip(helpers, parts[1:], strict=False):
            found = self._answer(helper)
            results += self._encoder.encode(part) if found is None else found
        return results

    def ready(self) -> list[_Helper]:
        """The helpers that can take a share."""
        for helper in list(self._helpers):
            if not helper.ready and helper.connection.poll():
                helper.ready = self._answer(helper) is not None
        return [helper for helper in self._helpers if helper.ready]

    def _start(self) -> None:
        for _ in range(self._count):
            ours, theirs = Pipe()
            path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
            process = subprocess.Popen(
                [sys.executable, "-c", _START.format(descriptor=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # The cores are taken by processes, so that a tokenizer need not take threads.
                env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is this process's; a helper ends when its pipe does
            )
            theirs.close()
            helper = _Helper(process, ours)
            self._helpers.append(helper)
            # A tokenizer is larger than a pipe, and this process goes on encoding until the helper has come up to read.
            threading.Thread(target=_send, args=(helper, self._arguments), daemon=True).start()
        self._count = 0  # they are not started a second time

    def _answer(self, helper: _Helper) -> list[Encoded | RowError] | None:
        """What the helper says; None where it has ended."""
        try:
            answer = helper.connection.recv()
        except (EOFError, OSError):
            self._end(helper)
            return None
        if isinstance(answer, str):
            raise InputError(answer)
        return [RowError(*item) if isinstance(item, tuple) else item for item in answer]

    def _end(self, helper: _Helper) -> None:
        self._helpers.remove(helper)
        helper.connection.close()
        helper.process.kill()
        helper.process.wait()


def _send(helper: _Helper, message: Any) -> None:
    # It has ended, which is noticed when it is listened to; or it is being ended, and its pipe is closed meanwhile.
    with contextlib.suppress(OSError, TypeError):
        helper.connection.send(message)


def main(descriptor: int) -> None:
    """A helper's life: it encodes what it is sent until its pipe is closed."""
    connection = Connection(descriptor)
    try:
        tokenizer, train_on, chat = connection.recv()
        encoder = Encoder(tokenizer, train_on=train_on, chat=chat)
        connection.send([])
        while True:
            connection.send(_encoded(encoder, connection.recv()))
    except (EOFError, OSError):
        return


def _encoded(
    encoder: Encoder, conversations: Sequence[Conversation]
) -> list[Encoded | tuple[str, str]] | str:
    """The results, with a RowError as its column and reason; an InputError's text."""
    try:
        results = encoder.encode(conversations)
    except InputError as error:
        return str(error)
    return [(item.column, item.reason) if isinstance(item, RowError) else item for item in results]
