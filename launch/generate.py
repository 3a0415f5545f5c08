"""Batched generation: a file of prompts in, a file of completions out. Run again after a kill, it continues.

Completions are written as they end; when all are there, the file is put in the order of the prompts.

A row of --prompts is {"id": ..., "prompt": "text" | "messages": [{"role", "content"}, ...] | "prompt_ids": [ints]},
id optional (default: the row's number, from 0); `system` and `tools` may stand beside messages, and a row of training
data is read as its prompt (`data.prompt_rows`). A text is taken as it is, or with --text_as=chat as a user's turn.
A row of --out is {"id", "sample", "text", "token_ids", "logprobs", "finish_reason"}; logprobs are the model's own
(nats, no temperature); "in_thought" is true where the prompt ended with <think>, so that the text starts inside a
thought. OUT.options.json, beside --out, holds the options of the completions.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import entry
from launch.completion_file import append, completed_samples, options_path, put_in_order, write_description
from launch.prompt_file import PromptFileRow, encode, log_prompts, read_prompts, sampling_id
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.installed import find_file

if TYPE_CHECKING:
    import numpy as np

    from posttrain_jax.models.io.load import LoadedModel
    from posttrain_jax.sampling.generate import GenerateOptions, Sample

EXAMPLE = "python -m launch.generate --model=runs/smollm2 --prompts=prompts.jsonl --out=completions.jsonl"
PROGRESS_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of the flags; see `define_flags`."""

    model: str
    prompts: str
    out: str
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    max_prompt_tokens: int = 0
    long_prompts: str = "error"
    num_samples: int = 1
    seed: int = 0
    dtype: str = "float32"
    ignore_eos: bool = False
    batch_size: int = 16
    fsdp: int = 1
    tensor: int = 1
    text_as: str = "plain"
    chat_template_kwargs: str = ""
    columns: str = ""
    ignore_columns: str = ""


def define_flags() -> None:
    """The command line; not at import, so that modules with like-named flags can be imported together."""
    flags.DEFINE_string("model", None, "A Hugging Face folder or name, a .gguf file, or a workdir.")
    flags.DEFINE_string(
        "prompts",
        None,
        "The prompts: .jsonl, .ndjson, .json, .csv, .tsv (each also with .gz) or .parquet.",
    )
    flags.DEFINE_string("out", None, "JSON Lines file to write; an incomplete one is continued.")
    flags.DEFINE_integer("max_new_tokens", Options.max_new_tokens, "Most tokens of a completion.")
    flags.DEFINE_integer("min_new_tokens", Options.min_new_tokens, "No stop before this many tokens.")
    flags.DEFINE_float("temperature", Options.temperature, "0 = always the likeliest token.")
    flags.DEFINE_float("top_p", Options.top_p, "Nucleus sampling; 1 = off.")
    flags.DEFINE_integer("top_k", Options.top_k, "Only the k likeliest tokens; 0 = off.")
    flags.DEFINE_float("min_p", Options.min_p, "Least share of the likeliest token's probability; 0 = off.")
    flags.DEFINE_float("repetition_penalty", Options.repetition_penalty, "On tokens seen before; 1 = off.")
    flags.DEFINE_float("presence_penalty", Options.presence_penalty, "On tokens of the completion; 0 = off.")
    flags.DEFINE_float("frequency_penalty", Options.frequency_penalty, "The same for every time; 0 = off.")
    flags.DEFINE_multi_string("stop", [], "A text that ends a completion; may be given more than once.")
    flags.DEFINE_multi_string(
        "bad_words", [], "A text whose tokens no completion holds in a row; may be repeated."
    )
    flags.DEFINE_integer(
        "max_prompt_tokens", Options.max_prompt_tokens, "0 = what the model's context allows."
    )
    flags.DEFINE_enum(
        "long_prompts",
        Options.long_prompts,
        ["error", "cut"],
        "Of a prompt that is too long: refuse it, or leave out its start (counted).",
    )
    flags.DEFINE_integer("num_samples", Options.num_samples, "Completions per prompt.")
    flags.DEFINE_integer("seed", Options.seed, "Of the random numbers.")
    flags.DEFINE_string("dtype", Options.dtype, "float32 or bfloat16, for weights and arithmetic.")
    flags.DEFINE_bool("ignore_eos", Options.ignore_eos, "Stop tokens do not end a completion.")
    flags.DEFINE_integer("batch_size", Options.batch_size, "Completions decoded side by side.")
    flags.DEFINE_integer("fsdp", Options.fsdp, "Devices that share the weights; the rest share the work.")
    flags.DEFINE_integer("tensor", Options.tensor, "Devices that share each layer.")
    flags.DEFINE_enum(
        "text_as",
        Options.text_as,
        ["plain", "chat"],
        "What a text prompt is: text as it stands, or a user's turn for the chat template.",
    )
    flags.DEFINE_string(
        "chat_template_kwargs",
        Options.chat_template_kwargs,
        'Variables of the chat template, as JSON: {"enable_thinking": false}.',
    )
    flags.DEFINE_string(
        "columns",
        Options.columns,
        """Our names of columns of --prompts, as JSON: {"prompt": "question"}.""",
    )
    flags.DEFINE_string(
        "ignore_columns", Options.ignore_columns, 'Columns of --prompts that are not read, "a,b".'
    )


def main(argv: Sequence[str]) -> int:
    """Completes every prompt that is not completed yet."""
    del argv
    given = flags.FLAGS
    if given.model is None or given.prompts is None or given.out is None:
        raise InputError(f"--model, --prompts and --out are needed; an example: {EXAMPLE}")
    values: dict[str, Any] = {field.name: given[field.name].value for field in dataclasses.fields(Options)}
    values |= {name: tuple(values[name]) for name in ("stop", "bad_words")}
    entry.set_up_jax()
    generate(Options(**values))
    return 0


def generate(options: Options) -> None:
    """Generates the completions that `options.out` lacks and appends them one by one.

    Raises:
      InputError: a bad option, a bad row, a prompt that the model cannot take, or an `out` that was made in
        another way.
    """
    from posttrain_jax.data.chat_template import ChatOptions, read_variables
    from posttrain_jax.models.io.load import load_language_model
    from posttrain_jax.rewards.thoughts import prompt_opens_thought
    from posttrain_jax.sampling.generate import generate_as_finished

    # Refuses bad options before the model is loaded.
    _generate_options(options, stop_token_ids=(), bad_words=())
    options = dataclasses.replace(options, prompts=str(find_file(options.prompts)))
    prompts = read_prompts(
        options.prompts,
        text_as=options.text_as,
        columns=options.columns,
        ignore_columns=options.ignore_columns,
    )
    out = Path(options.out).expanduser()
    chat = ChatOptions(
        variables=read_variables(options.chat_template_kwargs, "--chat_template_kwargs"),
        now=_template_date(out),
        text_as=options.text_as,
    )
    loaded = load_language_model(options.model, dtype=options.dtype, fsdp=options.fsdp, tensor=options.tensor)
    generate_options = _options_for(loaded, options)
    encoded = [encode(prompt, loaded.tokenizer, chat, model=loaded.source.name) for prompt in prompts]
    log_prompts(prompts, encoded, loaded.tokenizer)
    completions = functools.partial(
        generate_as_finished,
        loaded.model,
        loaded.params,
        encoded,
        generate_options,
        tokenizer=loaded.tokenizer,
        names=[prompt.where for prompt in prompts],
        ids=[sampling_id(prompt.id) for prompt in prompts],
    )
    completions()  # checks every prompt before anything is written
    expected = [(prompt.id, sample) for prompt in prompts for sample in range(options.num_samples)]
    description = describe(options, loaded, encoded) | {"template_date": str(chat.now)}
    done = completed_samples(out, expected, description)
    if len(done) < len(expected):
        if done:
            print(f"{out} holds {len(done)} of {len(expected)} completions; continuing.", file=sys.stderr)
        numbers = {prompt.id: number for number, prompt in enumerate(prompts)}
        done_indices = {(numbers[name], sample) for name, sample in done}
        progress = Progress(total=len(expected), done=len(done))
        try:
            write_description(out, description)
            with out.open("ab") as file:
                for sample in completions(done=done_indices):
                    in_thought = prompt_opens_thought(loaded.tokenizer, encoded[sample.prompt].tolist())
                    row = completion_row(sample, prompts[sample.prompt], loaded, in_thought=in_thought)
                    append(file, row)
                    progress.add(sample, is_empty=row["text"] is not None and not row["text"].strip())
        except OSError as error:
            raise InputError(
                f"--out={out} cannot be written ({error.strerror}); the completions before are complete."
            ) from error
        progress.finish(out)
    else:
        print(f"done: all {len(done)} completions were in {out} already.", file=sys.stderr)
    put_in_order(out, expected)


def _generate_options(
    options: Options, *, stop_token_ids: Sequence[int], bad_words: tuple[tuple[int, ...], ...]
) -> GenerateOptions:
    from posttrain_jax.sampling.choose import Sampling
    from posttrain_jax.sampling.generate import GenerateOptions

    return GenerateOptions(
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        stop_token_ids=tuple(stop_token_ids),
        stop_strings=options.stop,
        sampling=Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            bad_words=bad_words,
        ),
        num_samples=options.num_samples,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
        batch_size=options.batch_size,
        max_prompt_tokens=options.max_prompt_tokens,
        long_prompts=options.long_prompts,
    )


def _options_for(loaded: LoadedModel, options: Options) -> GenerateOptions:
    """The options with the model's stop tokens and the bad words as tokens. A bad word is banned at the start of a word
    too, where many tokenizers encode it with the space before it."""
    tokenizer = loaded.tokenizer
    words = set()
    for word in options.bad_words:
        if tokenizer is None:
            raise InputError(f"--bad_words need a tokenizer, and {loaded.source.name} has none.")
        words |= {
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word, f" {word}")
        }
    return _generate_options(options, stop_token_ids=loaded.stop_token_ids, bad_words=tuple(sorted(words)))


def _template_date(out: Path) -> datetime.datetime:
    """The date that a chat template sees: that of the first start, if this one continues it."""
    path = options_path(out)
    try:
        return datetime.datetime.fromisoformat(json.loads(path.read_text("utf-8"))["template_date"])
    except (OSError, ValueError, KeyError, TypeError):
        return datetime.datetime.now().replace(microsecond=0)


def describe(options: Options, loaded: LoadedModel, encoded: list[np.ndarray]) -> dict[str, Any]:
    """How the completions are made: the options, the checkpoint, and a hash of the encoded prompts."""
    digest = hashlib.sha256()
    for ids in encoded:
        digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
    description = {
        **dataclasses.asdict(options),
        "step": loaded.source.step,
        "prompts_sha256": digest.hexdigest(),
        "prompts_file_sha256": file_sha256(Path(options.prompts)),
    }
    return json.loads(json.dumps(description))  # as it is read back: tuples become lists


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, by which launch.win_rate knows that the prompts are still those that were completed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def completion_row(
    sample: Sample, prompt: PromptFileRow, loaded: LoadedModel, *, in_thought: bool = False
) -> dict[str, Any]:
    """One row of the output; `in_thought` says that the prompt ended with <think>.

    Raises:
      InputError: the model's numbers are not finite.
    """
    from posttrain_jax.rewards.thoughts import answer_text

    sample.check_finite(prompt.where)
    text = None
    if loaded.tokenizer is not None:
        text = answer_text(loaded.tokenizer, sample.tokens, stop_at=sample.stop_at)
    row = {
        "id": prompt.id,
        "sample": sample.sample,
        "text": text,
        "token_ids": sample.tokens.tolist(),
        "logprobs": [float(f"{value:.8g}") for value in sample.logprobs.tolist()],
        "finish_reason": sample.finish_reason,
    }
    row |= {"in_thought": True} if in_thought else {}
    return row | ({"prompt_tokens_cut": sample.cut} if sample.cut else {})


class Progress:
    """On stderr: a bar that is drawn anew in a terminal, a line every few seconds elsewhere."""

    def __init__(self, *, total: int, done: int) -> None:
        self._total = total
        self._first = self._done = done
        self._tokens = self._cut = self._empty = 0
        self._start = self._logged = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def add(self, sample: Sample, *, is_empty: bool) -> None:
        """Counts a completion, and logs the progress if the last time is long enough ago."""
        self._empty += is_empty
        self._done += 1
        self._tokens += len(sample.tokens)
        self._cut += sample.cut > 0
        now = time.monotonic()
        if now - self._logged >= (0.2 if self._terminal else PROGRESS_SECONDS) and self._done < self._total:
            self._logged = now
            left = (now - self._start) / (self._done - self._first) * (self._total - self._done)
            text = f"{self._done}/{self._total} completions, {self._rate(now)}, {left:.0f} s left"
            if self._terminal:
                filled = 30 * self._done // self._total
                print(
                    f"\r\033[K[{'#' * filled}{'.' * (30 - filled)}] {text}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
            else:
                print(text, file=sys.stderr)

    def finish(self, out: Path) -> None:
        """Logs that all is written."""
        from posttrain_jax.data.shown_row import empty_warning

        now = time.monotonic()
        cut = f" {self._cut} completions are of prompts whose start was left out." if self._cut else ""
        print(
            f"{chr(13) + chr(27) + '[K' if self._terminal else ''}done: {self._done} completions in {out}; "
            f"{self._tokens} tokens in {now - self._start:.1f} s, {self._rate(now)}.{cut}",
            file=sys.stderr,
        )
        warning = empty_warning(self._empty, self._done - self._first)
        if warning:
            print(warning, file=sys.stderr)

    def _rate(self, now: float) -> str:
        return f"{self._tokens / max(now - self._start, 1e-9):.1f} tokens/s"


if __name__ == "__main__":
    define_flags()
    entry.run(main, example=EXAMPLE)
