"""A chat with a model in the terminal. From a pipe: one completion for every line, and nothing else on stdout."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from absl import flags

from launch import entry
from posttrain_jax.core.errors import InputError

if TYPE_CHECKING:
    from posttrain_jax.data.chat_template import ChatOptions
    from posttrain_jax.models.io.load import LoadedModel
    from posttrain_jax.sampling.choose import Sampling

EXAMPLE = "python -m launch.chat --model=runs/smollm2"
HELP = """\
/reset           forget the conversation
/system TEXT     start again with this system prompt (without TEXT: with none)
/temperature X   0 = always the likeliest token
/help            this list
/quit            leave (Ctrl-D too); Ctrl-C stops a completion"""


def define_flags() -> None:
    """The command line; not at import, so that modules with like-named flags can be imported together."""
    flags.DEFINE_string("model", None, "A Hugging Face folder or name, a .gguf file, or a workdir.")
    flags.DEFINE_integer("max_new_tokens", 512, "Most tokens of a completion.")
    flags.DEFINE_float("temperature", 0.7, "0 = always the likeliest token.")
    flags.DEFINE_float("top_p", 0.95, "Nucleus sampling; 1 = off.")
    flags.DEFINE_integer("seed", 0, "Of the random numbers.")
    flags.DEFINE_string("system", "", "System prompt.")
    flags.DEFINE_string("dtype", "float32", "float32 or bfloat16, for weights and arithmetic.")
    flags.DEFINE_string(
        "chat_template_kwargs", "", 'Variables of the chat template, as JSON: {"enable_thinking": false}.'
    )


def main(argv: Sequence[str]) -> int:
    """Loads the model and talks until the input ends."""
    del argv
    from posttrain_jax.data.chat_template import ChatOptions, read_variables
    from posttrain_jax.models.io.load import load_model, require_language_model
    from posttrain_jax.sampling.choose import Sampling

    given = flags.FLAGS
    if given.model is None:
        raise InputError(f"--model is needed; an example: {EXAMPLE}")
    if given.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens={given.max_new_tokens} must be at least 1.")
    sampling = Sampling(temperature=given.temperature, top_p=given.top_p)
    entry.set_up_jax()
    loaded = load_model(given.model, dtype=given.dtype, param_dtype=given.dtype)
    require_language_model(loaded)
    talk(
        Chat(
            loaded,
            sampling,
            system=given.system,
            max_new_tokens=given.max_new_tokens,
            seed=given.seed,
            options=ChatOptions(
                variables=read_variables(given.chat_template_kwargs, "--chat_template_kwargs")
            ),
        )
    )
    return 0


@dataclasses.dataclass
class Interrupt:
    """Whether Ctrl-C was pressed during a completion."""

    pressed: bool = False


class Chat:
    """A conversation, and how it continues.

    Raises InputError for a model without a tokenizer or a chat template.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: Sampling,
        *,
        system: str,
        max_new_tokens: int,
        seed: int,
        options: ChatOptions,
    ) -> None:
        from posttrain_jax.sampling.stream import Stream

        if loaded.tokenizer is None:
            raise InputError(
                f"{loaded.source.name} has no tokenizer, so nobody can chat with it; add its tokenizer files."
            )
        if not loaded.tokenizer.chat_template:
            raise InputError(
                f"{loaded.source.name} has no chat template (it is a base model); tune it on chats first, or use "
                "python -m launch.generate with plain prompts."
            )
        self.tokenizer = loaded.tokenizer
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self._options = options
        self._stream = Stream(
            loaded.model,
            loaded.params,
            stop_token_ids=loaded.stop_token_ids,
            seed=seed,
        )
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forgets the conversation; `system` replaces the system prompt ("" = none)."""
        if system is not None:
            self.system = system
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def complete(self, text: str, interrupt: Interrupt) -> Iterator[str]:
        """Yields the completion in pieces of text; an interrupted one stays in the conversation as far as it came.

        Raises:
          InputError: the conversation does not fit the model's context any more (it is left as it was).
        """
        from posttrain_jax.sampling.prompts import encode_chat, text_pieces

        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_chat(self.tokenizer, messages, chat=self._options)
        tokens: list[int] = []

        def generated() -> Iterator[int]:
            for token in self._stream.complete(
                prompt, max_new_tokens=self.max_new_tokens, sampling=self.sampling
            ):
                if interrupt.pressed:
                    return
                tokens.append(token)
                yield token

        yield from text_pieces(self.tokenizer, generated())
        content = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": content}]


def talk(chat: Chat) -> None:
    """Reads lines until the input ends or /quit; with a terminal, shows a prompt and keeps a history.

    Raises:
      InputError: the input is not UTF-8.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 - gives input() a history and line editing

        print(f"{HELP}\n")
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
            line.encode()  # in some locales Python reads a wrong byte as half a character
        except UnicodeError:
            raise InputError("the input is not UTF-8 text; convert it first (iconv -t UTF-8).") from None
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n(Ctrl-D or /quit leaves)")
            continue
        if not terminal and not line:
            return
        line = line.strip()
        try:
            if not line:
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                command(chat, line)
            else:
                show(chat, line)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def command(chat: Chat, line: str) -> None:
    """Carries out a line that starts with a slash; its output goes to stderr.

    Raises:
      InputError: there is no such command, or its value is wrong.
    """
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/reset":
        chat.reset()
    elif name == "/system":
        chat.reset(value)
    elif name == "/temperature":
        try:
            chat.sampling = dataclasses.replace(chat.sampling, temperature=float(value))
        except ValueError:
            raise InputError(f"/temperature needs a number, such as 0.7, not {value!r}.") from None
    elif name == "/help":
        print(HELP, file=sys.stderr, flush=True)
    else:
        raise InputError(f"There is no command {name}; /help lists them.")


def show(chat: Chat, line: str) -> None:
    """Prints the completion as it comes; Ctrl-C stops it."""
    with catch_interrupt() as interrupt:
        for piece in chat.complete(line, interrupt):
            print(piece, end="", flush=True)
    print(" (stopped)" if interrupt.pressed else "", flush=True)


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """A context in which Ctrl-C sets a flag instead of raising: an exception inside a step could lose the cache."""
    interrupt = Interrupt()

    def press(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        interrupt.pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    define_flags()
    entry.run(main, example=EXAMPLE)
