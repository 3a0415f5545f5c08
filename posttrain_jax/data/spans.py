"""Where the assistant's turns lie in the text that a chat template renders.

A turn starts where the model starts to write: after the generation prompt. It ends with the end-of-turn token, the
first special token that the template puts after an assistant's text (or the run of such tokens, where a template
always puts several, as Cohere's does). `{% generation %}` in a template names the
spans outright. Without it, the prefix of the conversation before the turn, rendered with the generation prompt, is
cut off the whole; where a template rewrites history (Qwen3 drops earlier thinking) that prefix does not match, and
the turn is found by rendering the conversation again with a mark in the turn's place.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
import pathlib
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain_jax.data.formats import Conversation
from posttrain_jax.data.sources import RowError
from posttrain_jax.errors import InputError

# Stand-ins for message contents: private-use characters, which no template looks for and no text holds.
_USER_MARK, _MARK, _NEXT_MARK = "\ue0f0\ue0f1", "\ue0f2\ue0f3", "\ue0f4\ue0f5"


@dataclasses.dataclass(frozen=True)
class Span:
    """One assistant turn in the rendered text.

    Attributes:
      start: first character that the model writes.
      stop: end of the trained text before the end-of-turn token, or -1 when the turn runs up to that token.
    """

    start: int
    stop: int = -1


@dataclasses.dataclass(frozen=True)
class EndOfTurn:
    """The special tokens, nearly always one, that end a turn; `texts` and `token_ids` belong together."""

    texts: tuple[str, ...]
    token_ids: tuple[int, ...]

    @property
    def text(self) -> str:
        """The tokens' text, joined."""
        return "".join(self.texts)


@dataclasses.dataclass(frozen=True)
class TurnShape:
    """How a template surrounds an assistant's turn.

    Attributes:
      end: what ends a turn.
      tool_end: what ends a turn that calls tools (Llama 3.1 may end those differently).
      between_turns: `end` also ends turns that others follow, not only the last.
      header: text that the template puts before an assistant's content, when it has no generation prompt.
      prompt: the generation prompt.
    """

    end: EndOfTurn
    tool_end: EndOfTurn
    between_turns: bool
    header: str
    prompt: str


class ChatTemplate:
    """A chat template bound to its tokenizer. `template` is text, a path to a file, or "" for the tokenizer's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "") -> None:
        self.tokenizer = tokenizer
        self.source = resolve_template(tokenizer, template)
        self.shape = self._probe()

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """The conversation as text. Raises RowError with the template's own message when it refuses."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.source, add_generation_prompt=prompt, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowError("messages", f"the chat template refuses them: {error}") from None
        return str(text)

    def spans(self, conversation: Conversation) -> tuple[str, dict[int, list[Span]]]:
        """The rendered text, and the spans of each assistant message by its index. Raises RowError."""
        messages = list(conversation.messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in turns:
            self._refuse_end_inside(messages[i], i)
        if "endgeneration" in self.source:
            text, spans = self._named_spans(messages, turns, conversation.tools)
        else:
            text = self.render(messages, conversation.tools)
            starts = self._starts(messages, turns, conversation.tools, text)
            spans = {i: [Span(start)] for i, start in zip(turns, starts, strict=True)}
        self._refuse_lost_calls(messages, spans, text)
        return text, spans

    def _refuse_end_inside(self, message: dict[str, Any], index: int) -> None:
        ends = {*self.shape.end.texts, *self.shape.tool_end.texts}
        for key in ("content", "reasoning_content", "tool_calls"):
            value = str(message.get(key, ""))
            for end in ends:
                if end in value:
                    raise RowError(
                        f"messages[{index}].{key}",
                        f"holds the text of the end-of-turn token {end!r}; the model would learn to stop there",
                    )

    def _refuse_lost_calls(
        self, messages: list[dict[str, Any]], spans: dict[int, list[Span]], text: str
    ) -> None:
        for i, found in spans.items():
            for call in messages[i].get("tool_calls", ()):
                if not found or call["function"]["name"] not in text[found[0].start :]:
                    raise RowError(
                        f"messages[{i}].tool_calls",
                        "are not shown by this chat template; set data.chat_template to one that renders tool calls",
                    )

    def _named_spans(
        self, messages: list[dict[str, Any]], turns: list[int], tools: list[dict[str, Any]] | None
    ) -> tuple[str, dict[int, list[Span]]]:
        """Spans that the template marks with {% generation %}; a turn may have several (Phi-3's closing EOS)."""
        text, found = self._render_named(messages, tools)
        if len(found) == len(turns):
            return text, {i: [Span(*found[k])] for k, i in enumerate(turns)}
        spans: dict[int, list[Span]] = {i: [] for i in turns}
        starts = self._starts(messages, turns, tools, text)
        for start, stop in found:
            k = bisect.bisect_left(starts, stop) - 1
            spans[turns[max(k, 0)]].append(Span(start, stop))
        return text, spans

    def _starts(
        self,
        messages: list[dict[str, Any]],
        turns: list[int],
        tools: list[dict[str, Any]] | None,
        text: str,
    ) -> list[int]:
        starts: list[int] = []
        for i in turns:
            starts.append(self._turn_start(messages, i, tools, text, starts[-1] if starts else 0))
        return starts

    def _render_named(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        clean = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            texts, spans = render_jinja_template(
                conversations=[clean],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowError("messages", f"the chat template refuses them: {error}") from None
        return texts[0], spans[0]

    def _turn_start(
        self,
        messages: list[dict[str, Any]],
        index: int,
        tools: list[dict[str, Any]] | None,
        text: str,
        after: int,
    ) -> int:
        """The character at which message `index` starts to be the model's own; `after`: the turn before's."""
        if index > 0:
            try:
                prefix = self.render(messages[:index], tools, prompt=True)
            except RowError:  # some templates need a later message (a user's) before they render at all
                prefix = ""
            if prefix and len(prefix) >= after and text.startswith(prefix):
                return len(prefix) + self._header_length(text, len(prefix))
        return self._marked_start(messages, index, tools, text, after)

    def _header_length(self, text: str, at: int) -> int:
        """Length of a written header ("<|im_start|>assistant") where a template has no generation prompt for it."""
        header = self.shape.header
        return len(header) if header.strip() and text.startswith(header, at) else 0

    def _marked_start(
        self,
        messages: list[dict[str, Any]],
        index: int,
        tools: list[dict[str, Any]] | None,
        text: str,
        after: int,
    ) -> int:
        """Finds the turn as the place where the text changes when the turn's content does."""
        marked = {"role": "assistant", "content": _MARK}
        for message in ({**messages[index], **marked}, marked):
            replaced = [*messages[:index], message, *messages[index + 1 :]]
            try:
                other = self.render(replaced, tools)
            except RowError:
                continue
            if other == text:
                continue
            content = len(os.path.commonprefix((text, other)))
            # What the template itself put before the content: it stays when the message before changes, so that a
            # user who writes a generation prompt cannot be taken for the template.
            lead = text[after:content]
            if index > 0:
                replaced[index - 1] = {**messages[index - 1], "content": _USER_MARK}
                try:
                    changed = self.render(replaced, tools).partition(_MARK)[0]
                except RowError:
                    changed = lead
                lead = os.path.commonprefix((lead[::-1], changed[::-1]))[::-1]
            return content - self._generated_before_content(lead)
        raise RowError(
            f"messages[{index}]",
            "cannot be found in the rendered chat: the chat template rewrites the conversation around it; "
            "mark the assistant's turns with {% generation %} in data.chat_template",
        )

    def _generated_before_content(self, lead: str) -> int:
        """How many characters before a turn's content the model writes itself, given what the template put there."""
        prompt = self.shape.prompt
        if prompt:
            found = lead.rfind(prompt)
            # Not found: history keeps only the start of the generation prompt (DeepSeek-R1 opens <think> in it).
            return len(lead) - found - len(prompt) if found >= 0 else 0
        header = self.shape.header
        return len(header) if not header.strip() and lead.endswith(header) else 0

    def _probe(self) -> TurnShape:
        """Reads off how the template surrounds an assistant's turn, from two made-up conversations."""
        user, answer = {"role": "user", "content": _USER_MARK}, {"role": "assistant", "content": _MARK}
        follow = {"role": "user", "content": _NEXT_MARK}
        try:
            text = self.render([user, answer])
            prefix = self.render([user], prompt=True)
            bare = self.render([user])
        except RowError as error:
            raise InputError(
                f"the chat template cannot render a user's and an assistant's turn ({error.reason}); "
                "check data.chat_template"
            ) from None
        if _MARK not in text:
            raise InputError(
                "the chat template does not show the assistant's content; check data.chat_template"
            )
        end = self._end_in(text[text.rindex(_MARK) + len(_MARK) :])
        if end is None:
            raise InputError(
                "the chat template ends an assistant's turn with no special token, so the model would not learn to "
                "stop; set data.chat_template to one that ends the turn with a special token of the tokenizer, "
                f"such as {self.tokenizer.eos_token or '<|im_end|>'}"
            )
        try:
            longer = self.render([user, answer, follow])
            middle = self._end_in(longer[longer.rindex(_MARK) + len(_MARK) : longer.rindex(_NEXT_MARK)])
        except (RowError, ValueError):
            middle = end
        # Between turns the next turn's header may follow at once; what both have in common ends the turn.
        common = tuple(os.path.commonprefix((end.texts, middle.texts if middle else ())))
        end = EndOfTurn(common, end.token_ids[: len(common)]) if common else end
        has_prompt = prefix != bare
        start = len(prefix) if has_prompt else len(os.path.commonprefix((bare, text)))
        return TurnShape(
            end=end,
            tool_end=self._tool_turn_end(user, end),
            between_turns=bool(common),
            header="" if has_prompt else text[start : text.rindex(_MARK)],
            prompt=prefix[len(os.path.commonprefix((bare, prefix))) :] if has_prompt else "",
        )

    def _tool_turn_end(self, user: dict[str, Any], end: EndOfTurn) -> EndOfTurn:
        """What ends a turn that calls a tool: the usual, unless another special token stands in its place."""
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": _MARK}}}
        try:
            text = self.render([user, {"role": "assistant", "content": "", "tool_calls": [call]}])
        except RowError:
            return end
        tail = text[text.rindex(_MARK) + len(_MARK) :] if _MARK in text else end.text
        return end if end.text in tail else self._end_in(tail) or end

    def _end_in(self, text: str) -> EndOfTurn | None:
        """The first run of tokens in `text` that the tokenizer never splits (special or added), without blanks."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        whole = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder} - {unknown}
        run: list[tuple[str, int]] = []
        for token, name in zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True):
            if token in whole and name.strip():
                run.append((str(name), token))
            elif run:
                break
        return EndOfTurn(tuple(name for name, _ in run), tuple(token for _, token in run)) if run else None


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: str = "") -> str:
    """The template's text: given as text, as a path, or "" for the tokenizer's own. Raises InputError."""
    if template:
        if "{{" in template or "{%" in template:
            return template
        path = pathlib.Path(template).expanduser()
        if not path.is_file():
            raise InputError(f"data.chat_template {template!r} is neither a file nor a template's text")
        return path.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise InputError(
            "the data holds chats, but the model's tokenizer has no chat template (it is a base model); "
            "set data.chat_template to a template's text or the path of a .jinja file"
        )
    return str(tokenizer.get_chat_template())
