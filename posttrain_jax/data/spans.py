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
import contextlib
import datetime
import functools
import os
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import (
    DEFAULT_CHAT,
    ChatOptions,
    EndOfTurn,
    Rendered,
    Span,
    Template,
    TemplateLimitError,
    TemplateRefusalError,
    Turns,
    TurnShape,
    resolve_template,
)
from posttrain_jax.data.formats import Conversation
from posttrain_jax.data.rows import RowError, one_line

# Stand-ins for message contents: private-use characters, which no template looks for and no text holds.
_USER_MARK, _MARK, _NEXT_MARK = "\ue0f0\ue0f1", "\ue0f2\ue0f3", "\ue0f4\ue0f5"


_MOST_OVERRUNS = 2
_KEEP_THOUGHTS = (
    "set data.chat_template to one that keeps thoughts (such as configs/templates/deepseek_r1.jinja), or write them "
    "into content if the template shows that whole"
)


class ChatTemplate:
    """A chat template bound to its tokenizer.

    Args:
      tokenizer: whose special tokens the template uses.
      options: which template, its variables and its date.
      tools: the rows have tools (a tokenizer may have another template for those).

    Raises InputError for a template that is not there or cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: ChatOptions = DEFAULT_CHAT,
        *,
        tools: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        source = resolve_template(tokenizer, options.template, tools=tools)
        now = options.now or datetime.datetime.now()  # one for all renderings, which are compared
        self._template = Template(source, tokenizer, variables=options.variables, now=now)
        self._overruns = 0

    @functools.cached_property
    def shape(self) -> TurnShape:
        """How it surrounds an assistant's turn. Raises InputError where such a turn cannot be trained."""
        return self._probe()

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """The conversation as text. Raises RowError with the template's own message when it refuses."""
        return self._rendered(messages, tools, prompt=prompt).text

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """The conversation up to where the assistant starts to write. Raises RowError, also for lost tools and calls.

        That is where training begins: a template without a generation prompt gets the header that it writes before an
        assistant's content.
        """
        text = self.render(messages, tools, prompt=True)
        self._refuse_lost_tools(messages, tools, text, prompt=True)
        self._refuse_lost_calls(messages, tools, prompt=True)
        if "add_generation_prompt" in self._template.source:
            return text
        try:
            header = self.shape.header
        except InputError:  # a template that cannot be trained on may still be generated with
            return text
        return text + header if header.strip() else text

    def _rendered(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> Rendered:
        try:
            return self._template.render(messages, tools, prompt=prompt)
        except TemplateLimitError as error:
            self._overruns += 1
            if self._overruns > _MOST_OVERRUNS:  # of thousands of rows, reading them would not end
                text = one_line(str(messages[-1].get("content", "")), 80)
                raise InputError(
                    f"the chat template cannot render {self._overruns} conversations, the last with {text!r}: {error}; "
                    "check data.chat_template"
                ) from None
            raise RowError("messages", f"the chat template refuses them: {error}") from None
        except TemplateRefusalError as error:
            raise RowError("messages", f"the chat template refuses them: {error}") from None

    def _refuse_lost_tools(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str, *, prompt: bool
    ) -> None:
        if tools and text == self.render(messages, prompt=prompt):
            raise RowError(
                "tools",
                "are not shown by this chat template; set data.chat_template to one that renders tools, or leave the "
                "column out",
            )

    def turns(self, conversation: Conversation) -> Turns:
        """The rendered text, and where the assistant's turns lie in it. Raises RowError."""
        messages = list(conversation.messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in turns:
            self._refuse_end_inside(messages[i], i)
        rendered = self._rendered(messages, conversation.tools)
        text = rendered.text
        self._refuse_lost_tools(messages, conversation.tools, text, prompt=False)
        if rendered.generated:
            spans = self._named_spans(messages, turns, conversation.tools, rendered)
        else:
            starts = self._starts(messages, turns, conversation.tools, text)
            spans = {i: [Span(start)] for i, start in zip(turns, starts, strict=True)}
        self._refuse_lost_calls(messages, conversation.tools, prompt=False)
        untrainable = {}
        for i, of_turn in spans.items():
            if conversation.trained[i] and of_turn:
                until = min(
                    (later[0].start for j, later in spans.items() if j > i and later), default=len(text)
                )
                reason = self._untrainable(messages, i, conversation.tools, text[:until], of_turn[0].start)
                if reason:
                    untrainable[i] = reason
        return Turns(text, spans, untrainable)

    def _untrainable(
        self,
        messages: list[dict[str, Any]],
        index: int,
        tools: list[dict[str, Any]] | None,
        text: str,
        start: int,
    ) -> str:
        """Why the turn that begins at `start` is not what the model writes after its prompt; "" where it is.

        An answer without its thought, or after another header, would be trained at a place where generation is not.
        """
        thought = thought_of(messages[index])
        if thought and thought not in text[start:]:
            return (
                "has a thought that this chat template does not show here, so the answer would be trained where the "
                f"model thinks first; {_KEEP_THOUGHTS}"
            )
        prompt = self.shape.prompt
        if not text[:start].endswith(prompt):
            with contextlib.suppress(RowError):  # then what the probe found is all that is known
                prompt = self._prompt_alone(messages[:index], tools)
        if not text[:start].endswith(prompt):
            return (
                f"is not shown after the generation prompt {prompt!r}, so it would be trained where the model does not "
                f"start to write; {_KEEP_THOUGHTS}"
            )
        return ""

    def _prompt_alone(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """What the generation prompt adds to these messages."""
        if not messages:
            return self.shape.prompt
        whole, bare = self.render(messages, tools, prompt=True), self.render(messages, tools)
        return whole[len(os.path.commonprefix((bare, whole))) :]

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
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, prompt: bool
    ) -> None:
        """Refuses calls that the template does not show: other names in their place do not appear."""
        message_of: dict[str, int] = {}
        marked = []
        for i, message in enumerate(messages):
            calls = []
            for call in message.get("tool_calls", ()):
                name = f"call_{len(message_of)}_9e1b7c"
                message_of[name] = i
                calls.append({**call, "function": {**call["function"], "name": name}})
            marked.append({**message, "tool_calls": calls} if calls else message)
        if not message_of:
            return
        try:
            text = self.render(marked, tools, prompt=prompt)
        except RowError:  # a template that looks names up among the tools cannot be asked
            return
        for name, i in message_of.items():
            if name not in text:
                raise RowError(
                    f"messages[{i}].tool_calls",
                    "are not shown by this chat template; set data.chat_template to one that renders tool calls",
                )

    def _named_spans(
        self,
        messages: list[dict[str, Any]],
        turns: list[int],
        tools: list[dict[str, Any]] | None,
        rendered: Rendered,
    ) -> dict[int, list[Span]]:
        """Spans that the template marks with {% generation %}; a turn may have several (Phi-3's closing EOS)."""
        blocks = rendered.generated
        if len(blocks) == len(turns):
            return {i: [Span(*blocks[k])] for k, i in enumerate(turns)}
        spans: dict[int, list[Span]] = {i: [] for i in turns}
        starts = self._starts(messages, turns, tools, rendered.text)
        for start, stop in blocks:
            k = bisect.bisect_left(starts, stop) - 1
            spans[turns[max(k, 0)]].append(Span(start, stop))
        return spans

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
            start = lead.rfind(prompt)
            # Not found: history keeps only the start of the generation prompt (DeepSeek-R1 opens <think> in it).
            return len(lead) - start - len(prompt) if start >= 0 else 0
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


def thought_of(message: dict[str, Any]) -> str:
    """What a message says before its answer: `reasoning_content`, or what stands before `</think>`; "" = nothing."""
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str):
        return reasoning.strip()
    content = message.get("content")
    if not isinstance(content, str) or "</think>" not in content:
        return ""
    return content.split("</think>")[0].split("<think>")[-1].strip()
