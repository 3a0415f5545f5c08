"""Conversations to token ids and a loss mask that covers what the assistant says, and nothing else.

The ids of a chat are those of `tokenizer.apply_chat_template` of the whole conversation. A trained turn runs from
the first token after the generation prompt up to and including its end-of-turn token, not the newline after it. A
token is trained when any of its characters belongs to the turn, so one that joins the header's last newline to the
answer's first counts. Literal special tokens in a user's text become special tokens, as they do in transformers,
but cannot move a turn; an assistant's text that holds its own end-of-turn token is a bad row.

Prompt and completion texts are encoded without a template: the prompt as it is encoded alone (that is what the
model sees when it generates), the completion's tokens, EOS; plain text is BOS (if the tokenizer adds one), text,
EOS. The first token of a sequence has no prediction and is never trained.
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

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions, EndOfTurn, Span, Turns, has_template
from posttrain_jax.data.formats import Conversation
from posttrain_jax.data.prompt_rows import encode_text
from posttrain_jax.data.rows import RowError
from posttrain_jax.data.spans import ChatTemplate

TRAIN_ON = ("all_turns", "last_turn")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One sequence: `tokens` int32 `[n]`, and `loss_mask` bool `[n]`, True where the token is trained.

    `untrained_turns` counts the turns that would be trained if the chat template showed them as the model writes them.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    untrained_turns: int = 0


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: str = "all_turns",
    chat_template: str = "",
) -> Encoded:
    """Encodes one conversation. Raises RowError when the template refuses it, InputError as `Encoder` does."""
    encoder = Encoder(tokenizer, train_on=train_on, chat=ChatOptions(template=chat_template))
    result = encoder.encode([conversation])[0]
    if isinstance(result, RowError):
        raise result
    return result


class Encoder:
    """Encodes conversations in batches; how the template and the tokenizer behave is probed once.

    Args:
      tokenizer: a fast tokenizer of transformers.
      train_on: "all_turns", or "last_turn" for the last assistant turn of each chat alone.
      chat: how chats become text.

    Raises InputError for a tokenizer without offsets, without EOS, or a template that cannot be trained on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_on: str = "all_turns",
        chat: ChatOptions = DEFAULT_CHAT,
    ) -> None:
        if train_on not in TRAIN_ON:
            raise InputError(f"data.train_on is {train_on!r}; it must be one of {', '.join(TRAIN_ON)}")
        if not tokenizer.is_fast:
            raise InputError(
                "the tokenizer gives no character offsets; use one with a tokenizer.json (a fast one)"
            )
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._chat = chat
        self.has_template = has_template(tokenizer, chat)
        self._templates: dict[bool, ChatTemplate] = {}
        self._never_split = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | RowError]:
        """One Encoded, or the RowError that says why there is none, for each conversation."""
        results: list[Encoded | RowError | None] = [None] * len(conversations)
        chats: list[tuple[int, Turns]] = []
        for i, conversation in enumerate(conversations):
            try:
                if conversation.messages:
                    chats.append((i, self._template(conversation).turns(conversation)))
                elif conversation.text is not None:
                    results[i] = self._plain(conversation.text)
                else:
                    results[i] = self._prompt_completion(conversation)
            except RowError as error:
                results[i] = error
        if chats:
            batch = self._tokenizer(
                [turns.text for _, turns in chats],
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            for k, (i, turns) in enumerate(chats):
                offsets = np.asarray(batch["offset_mapping"][k], np.int64).reshape(-1, 2)
                try:
                    results[i] = self._masked(conversations[i], batch["input_ids"][k], offsets, turns)
                except RowError as error:
                    results[i] = error
        return [result for result in results if result is not None]

    def _template(self, conversation: Conversation) -> ChatTemplate:
        tools = bool(conversation.tools)
        if tools not in self._templates:
            self._templates[tools] = ChatTemplate(self._tokenizer, self._chat, tools=tools)
        return self._templates[tools]

    def _masked(
        self, conversation: Conversation, ids: list[int], offsets: np.ndarray, turns: Turns
    ) -> Encoded:
        shape, spans = self._template(conversation).shape, turns.spans
        tokens, ends = np.asarray(ids, np.int32), offsets[:, 1]
        mask = np.zeros(len(tokens), bool)
        to_train = [i for i in spans if conversation.trained[i]]
        if self._train_on == "last_turn":
            to_train = to_train[-1:]
        trained = [i for i in to_train if i not in turns.untrainable]
        if to_train and not trained:
            raise RowError(f"messages[{to_train[-1]}]", turns.untrainable[to_train[-1]])
        last = len(conversation.messages) - 1
        for i in trained:
            if i != last and not shape.between_turns:
                raise InputError(
                    f"the chat template ends an assistant's turn with {shape.end.text!r} only at the end of the chat, "
                    "so the model would not learn to stop in the turns before; set data.train_on=last_turn or another "
                    "data.chat_template"
                )
            end = shape.tool_end if conversation.messages[i].get("tool_calls") else shape.end
            following = min((later[0].start for j, later in spans.items() if j > i and later), default=None)
            until = len(tokens) if following is None else int(np.searchsorted(ends, following, side="right"))
            ended = False
            for span in spans[i]:
                first = self._first_token(tokens, offsets, span.start)
                stop = _end_of_turn(tokens[:until], first, end)
                if span.stop >= 0:
                    stop = self._named_stop(tokens, ends, span, stop)
                mask[first : stop + 1] = True
                ended |= _end_of_turn(tokens[: stop + 1], first, end) >= 0
            if not ended:
                raise RowError(
                    f"messages[{i}]",
                    f"is not closed by the end-of-turn token {end.text!r} before the next turn; the model would not "
                    "learn to stop",
                )
        mask[:1] = False
        return Encoded(tokens, mask, untrained_turns=len(to_train) - len(trained))

    def _first_token(self, tokens: np.ndarray, offsets: np.ndarray, start: int) -> int:
        """The first token of a turn that begins at the character `start`.

        A special token that takes the blanks after it (`rstrip`, as Phi-3's) can reach into the turn; it is the
        header's all the same.
        """
        first = int(np.searchsorted(offsets[:, 1], start, side="right"))
        while first < len(tokens) and offsets[first, 0] < start and int(tokens[first]) in self._never_split:
            first += 1
        return first

    def _named_stop(self, tokens: np.ndarray, ends: np.ndarray, span: Span, stop: int) -> int:
        """The last token of a span whose end the template names: its end of turn, if only blanks lie between."""
        inside = int(np.searchsorted(ends, span.stop, side="left"))
        between = tokens[min(inside, stop) + 1 : max(inside + 1, stop)]
        return stop if stop >= 0 and not self._tokenizer.decode(between).strip() else inside

    def _plain(self, text: str) -> Encoded:
        ids = self._with_eos(encode_text(self._tokenizer, text).tolist())
        mask = np.ones(len(ids), bool)
        mask[0] = False
        return Encoded(np.asarray(ids, np.int32), mask)

    def _prompt_completion(self, conversation: Conversation) -> Encoded:
        """The completion's tokens are those it has after the prompt, unless they would change the prompt's."""
        prompt, completion = conversation.prompt or "", conversation.completion or ""
        before = encode_text(self._tokenizer, prompt).tolist()
        whole = encode_text(self._tokenizer, prompt + completion).tolist()
        if whole[: len(before)] != before:
            whole = before + self._tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        ids = self._with_eos(whole)
        mask = np.arange(len(ids)) >= max(len(before), 1)
        return Encoded(np.asarray(ids, np.int32), mask)

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise InputError(
                "the tokenizer has no EOS token, so the model would not learn to stop; set its eos_token"
            )
        return ids if ids and ids[-1] == eos else [*ids, eos]


def _end_of_turn(tokens: np.ndarray, first: int, end: EndOfTurn) -> int:
    """Index of the last token of the first end of turn from `first` on, or -1."""
    width = len(end.token_ids)
    for at in np.flatnonzero(tokens[first:] == end.token_ids[0]) + first:
        if tuple(tokens[at : at + width].tolist()) == end.token_ids:
            return int(at) + width - 1
    return -1


# ---- on all cores: an `Encoder` here, and one in each of some helper processes
#
# Rendering a chat and finding its turns is Python, so threads do not help. The helpers are started when encoding has
# taken some seconds, for a small file is done before they are ready, and each takes its share of every list; results
# are those of one `Encoder`, in order. A helper that ends (out of memory, say) leaves its share to this process.

START_AFTER = 3.0
"""Seconds of encoding before helpers are started."""

MOST_HELPERS = 15
"""Reading the rows and writing the tokens stay in this process, and are a sixth of the work."""

_START = "from posttrain_jax.data.chat import main; main({descriptor})"


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
            encoded = self._answer(helper)
            results += self._encoder.encode(part) if encoded is None else encoded
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
