"""Batched generation: a file of prompts in, a file of answers out. Run again after a kill, it goes on.

Answers are written as they end, in whatever order that is; when all are there, the file is put in the order of the
prompts.

A row of --prompts is {"id": ..., "prompt": "text" | "messages": [{"role", "content"}, ...] | "prompt_ids": [ints]},
id optional (default: the row's number, from 0); `tools` may stand beside messages. A row of --out is {"id", "sample",
"text", "token_ids", "logprobs", "finish_reason"}; logprobs are the model's own (nats, no temperature); "in_thought" is
true where the prompt ended with <think>, so that the text starts inside a thought. Beside --out lies OUT.options.json,
which says how the answers were made.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from absl import flags

from launch import entry
from posttrain_jax.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from posttrain_jax.load_model import LoadedModel
    from posttrain_jax.sampling.generate import GenerateOptions, Sample

EXAMPLE = "python -m launch.generate --model=runs/smollm2 --prompts=prompts.jsonl --out=answers.jsonl"
SOURCES = ("prompt", "messages", "prompt_ids")
PROGRESS_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say; see `define_flags`."""

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


# They change how the answers are computed, or where things lie, not what the answers are.
FREE_OPTIONS = ("prompts", "prompts_file_sha256", "out", "batch_size", "fsdp", "tensor")


def define_flags() -> None:
    """The command line; not at import, so that modules with like-named flags can be imported together."""
    flags.DEFINE_string("model", None, "A Hugging Face folder or name, a .gguf file, or a workdir.")
    flags.DEFINE_string("prompts", None, "JSON Lines (or .json, .parquet) with the prompts.")
    flags.DEFINE_string("out", None, "JSON Lines file to write; one that is not complete is gone on with.")
    flags.DEFINE_integer("max_new_tokens", Options.max_new_tokens, "Most tokens of an answer.")
    flags.DEFINE_integer("min_new_tokens", Options.min_new_tokens, "No stop before this many tokens.")
    flags.DEFINE_float("temperature", Options.temperature, "0 = always the likeliest token.")
    flags.DEFINE_float("top_p", Options.top_p, "Nucleus sampling; 1 = off.")
    flags.DEFINE_integer("top_k", Options.top_k, "Only the k likeliest tokens; 0 = off.")
    flags.DEFINE_float("min_p", Options.min_p, "Least share of the likeliest token's probability; 0 = off.")
    flags.DEFINE_float("repetition_penalty", Options.repetition_penalty, "On tokens seen before; 1 = off.")
    flags.DEFINE_float("presence_penalty", Options.presence_penalty, "On tokens of the answer; 0 = off.")
    flags.DEFINE_float("frequency_penalty", Options.frequency_penalty, "The same for every time; 0 = off.")
    flags.DEFINE_multi_string("stop", [], "A text that ends an answer; may be given more than once.")
    flags.DEFINE_multi_string(
        "bad_words", [], "A text whose tokens no answer holds in a row; may be repeated."
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
    flags.DEFINE_integer("num_samples", Options.num_samples, "Answers per prompt.")
    flags.DEFINE_integer("seed", Options.seed, "Of the random numbers.")
    flags.DEFINE_string("dtype", Options.dtype, "float32 or bfloat16, for weights and arithmetic.")
    flags.DEFINE_bool("ignore_eos", Options.ignore_eos, "Stop tokens do not end an answer.")
    flags.DEFINE_integer("batch_size", Options.batch_size, "Answers decoded side by side.")
    flags.DEFINE_integer("fsdp", Options.fsdp, "Devices that share the weights; the answers take the others.")
    flags.DEFINE_integer("tensor", Options.tensor, "Devices that share each layer.")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of --prompts: its id, where it stands, and its columns, checked."""

    id: str | int
    where: str
    row: dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Answers every prompt that is not answered yet."""
    del argv
    given = flags.FLAGS
    if given.model is None or given.prompts is None or given.out is None:
        raise InputError(f"--model, --prompts and --out are needed; an example: {EXAMPLE}")
    values: dict[str, Any] = {field.name: given[field.name].value for field in dataclasses.fields(Options)}
    values |= {name: tuple(values[name]) for name in ("stop", "bad_words")}
    entry.set_up_jax()
    generate(Options(**values))
    return 0


def read_prompts(path: str) -> list[Prompt]:
    """All prompts, in order.

    Raises:
      InputError: the file is missing or empty, or a row is bad; names the file and the line.
    """
    from posttrain_jax.data.sources import RowError, read_rows

    if not Path(path).is_file():
        raise InputError(f"--prompts={path}: there is no such file.")
    prompts: list[Prompt] = []
    first: dict[str | int, str] = {}
    for number, row in enumerate(read_rows(path)):
        where = f"{row.source}:{row.line}"
        try:
            if row.error is not None:
                raise row.error
            prompt = Prompt(_row_id(row.value, number), where, _checked(row.value))
            if first.setdefault(prompt.id, where) != where:
                raise RowError("id", f"is {prompt.id!r}, which {first[prompt.id]} has already")
            prompts.append(prompt)
        except RowError as error:
            raise InputError(f"{where}: {error.column} {error.reason}.") from error
    return prompts


def _row_id(row: dict[str, Any], number: int) -> str | int:
    from posttrain_jax.data.sources import RowError

    name = row.get("id")
    if name is None:
        return number
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise RowError("id", "must be text or a whole number")
    return name


def noise_id(name: str | int) -> int:
    """The number below 2^31 by which a prompt's random numbers are drawn: its id, hashed where it is not one."""
    if isinstance(name, int) and 0 <= name < 1 << 31:
        return name
    return int.from_bytes(hashlib.sha256(json.dumps(name).encode()).digest()[:4]) >> 1


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """The row, if exactly one of SOURCES is in it and is what it should be. Raises RowError."""
    from posttrain_jax.data.messages import ROLES
    from posttrain_jax.data.sources import RowError

    given = [key for key in SOURCES if row.get(key) is not None]
    if len(given) != 1:
        found = " and ".join(given) if given else f"none of them (its columns: {', '.join(row) or 'none'})"
        raise RowError("the row", f"needs exactly one of {', '.join(SOURCES)}, but has {found}")
    value = row[given[0]]
    if given[0] == "prompt":
        if not isinstance(value, str):
            raise RowError("prompt", "must be text (a list of messages goes under messages)")
    elif not isinstance(value, list):
        raise RowError(given[0], "must be a list")
    elif not value:
        raise RowError(given[0], "is empty")
    elif given[0] == "prompt_ids":
        wrong = [item for item in value if isinstance(item, bool) or not isinstance(item, int)]
        if wrong:
            raise RowError("prompt_ids", f"holds {json.dumps(wrong[0])}; token ids are whole numbers")
    else:
        for i, message in enumerate(value):
            column = f"messages[{i}]"
            if not isinstance(message, dict):
                raise RowError(column, "must be an object with role and content")
            if message.get("role") not in ROLES:
                raise RowError(
                    f"{column}.role", f"is {message.get('role')!r}; it must be one of {', '.join(ROLES)}"
                )
            if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
                raise RowError(f"{column}.content", "must be text")
    return row


def generate(options: Options) -> None:
    """Generates what `options.out` lacks and appends it answer by answer.

    Raises:
      InputError: a bad option, a bad row, a prompt that the model cannot take, or an `out` that was made in
        another way.
    """
    import jax

    from posttrain_jax.load_model import load_model, require_language_model
    from posttrain_jax.rewards.thoughts import prompt_opens_thought
    from posttrain_jax.sampling.generate import generate_as_finished
    from posttrain_jax.sharding import make_mesh

    _asked(options, stop_token_ids=(), bad_words=())  # refuses bad options before the model is read
    prompts = read_prompts(options.prompts)
    alone = (jax.device_count(), options.fsdp, options.tensor) == (1, 1, 1)
    mesh = None if alone else make_mesh(data=-1, fsdp=options.fsdp, tensor=options.tensor)
    loaded = load_model(options.model, dtype=options.dtype, param_dtype=options.dtype, mesh=mesh)
    require_language_model(loaded)
    asked = _asked_of(loaded, options)
    encoded = [encode(prompt, loaded) for prompt in prompts]
    answers = functools.partial(
        generate_as_finished,
        loaded.model,
        loaded.params,
        encoded,
        asked,
        tokenizer=loaded.tokenizer,
        names=[prompt.where for prompt in prompts],
        ids=[noise_id(prompt.id) for prompt in prompts],
    )
    answers()  # checks every prompt before anything is written
    out = Path(options.out).expanduser()
    wanted = [(prompt.id, sample) for prompt in prompts for sample in range(options.num_samples)]
    description = describe(options, loaded, encoded)
    done = take_up(out, wanted, description)
    if len(done) < len(wanted):
        if done:
            print(f"{out} holds {len(done)} of {len(wanted)} answers; going on.", file=sys.stderr)
        numbers = {prompt.id: number for number, prompt in enumerate(prompts)}
        places = {(numbers[name], sample) for name, sample in done}
        progress = Progress(total=len(wanted), done=len(done))
        try:
            write_description(out, description)
            with out.open("ab") as file:
                for sample in answers(done=places):
                    in_thought = prompt_opens_thought(loaded.tokenizer, encoded[sample.prompt].tolist())
                    append(file, answer_row(sample, prompts[sample.prompt], loaded, in_thought=in_thought))
                    progress.add(sample)
        except OSError as error:
            raise InputError(
                f"--out={out} cannot be written ({error.strerror}); the answers before are whole."
            ) from error
        progress.finish(out)
    else:
        print(f"done: all {len(done)} answers were in {out} already.", file=sys.stderr)
    put_in_order(out, wanted)


def _asked(
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


def _asked_of(loaded: LoadedModel, options: Options) -> GenerateOptions:
    """The options with what the model's tokenizer makes of them. A bad word is banned at the start of a word too,
    where many tokenizers write it with the space before it."""
    from posttrain_jax.models.tokenizer import stop_token_ids

    tokenizer = loaded.tokenizer
    words = set()
    for word in options.bad_words:
        if tokenizer is None:
            raise InputError(f"--bad_words need a tokenizer, and {loaded.source.name} has none.")
        words |= {
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word, f" {word}")
        }
    stops = stop_token_ids(loaded.config, loaded.tokenizer)
    return _asked(options, stop_token_ids=stops, bad_words=tuple(sorted(words)))


def encode(prompt: Prompt, loaded: LoadedModel) -> np.ndarray:
    """The prompt's token ids.

    Raises:
      InputError: names the row; the model has no tokenizer or chat template, or the template refuses the row.
    """
    import numpy as np

    from posttrain_jax.sampling.prompts import encode_chat, encode_text

    row = prompt.row
    if row.get("prompt_ids") is not None:
        try:
            ids = np.asarray(row["prompt_ids"], np.int64)
        except OverflowError as error:
            raise InputError(f"{prompt.where}: prompt_ids holds a number that is no token id.") from error
    elif loaded.tokenizer is None:
        raise InputError(f"{prompt.where}: {loaded.source.name} has no tokenizer; give prompt_ids.")
    else:
        try:
            if row.get("messages") is not None:
                ids = encode_chat(loaded.tokenizer, row["messages"], tools=row.get("tools"))
            else:
                ids = encode_text(loaded.tokenizer, row["prompt"])
        except InputError as error:
            raise InputError(f"{prompt.where}: {error}") from error
    return ids


def describe(options: Options, loaded: LoadedModel, encoded: list[np.ndarray]) -> dict[str, Any]:
    """How the answers are made: the options, the checkpoint, and a hash of the encoded prompts."""
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
    """Of a file's bytes: what tells launch.win_rate that the prompts are still those that were answered."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def options_path(out: Path) -> Path:
    """Where the options of `out` lie."""
    return out.with_name(f"{out.name}.options.json")


def write_description(out: Path, description: dict[str, Any]) -> None:
    """Writes how the answers are made beside `out`, atomically."""
    partial = options_path(out).with_suffix(".partial")
    partial.write_text(json.dumps(description, indent=2) + "\n", "utf-8")
    partial.replace(options_path(out))


def take_up(
    out: Path, wanted: list[tuple[str | int, int]], description: dict[str, Any]
) -> set[tuple[str | int, int]]:
    """The (id, sample) pairs that `out` holds already; a torn last line is cut off.

    Raises:
      InputError: it holds answers to other prompts, or answers made with other options.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            return set()
        _check_description(out, description)
        return set(_whole_rows(out, set(wanted)))
    except OSError as error:
        raise InputError(f"--out={out} cannot be used ({error.strerror}).") from error


def put_in_order(out: Path, wanted: list[tuple[str | int, int]]) -> None:
    """Rewrites a complete `out` in the order of the prompts, atomically; leaves one in order as it is."""
    rows = _whole_rows(out, set(wanted))
    if list(rows) == wanted:
        return
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.write_bytes(b"".join(rows[key] for key in wanted))
        partial.replace(out)
    except OSError as error:
        raise InputError(
            f"--out={out} is complete but could not be put in the order of the prompts ({error.strerror})."
        ) from error


def _check_description(out: Path, description: dict[str, Any]) -> None:
    path = options_path(out)
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text("utf-8"))
    except ValueError:
        before = {}
    differing = [
        f"{key} ({before.get(key)!r} then, {value!r} now)"
        for key, value in description.items()
        if before.get(key) != value and key not in FREE_OPTIONS
    ]
    if differing and out.stat().st_size:
        raise InputError(
            f"--out={out} was made with other options: {'; '.join(differing)}. Use the same ones to go on, or another "
            "--out."
        )


def _whole_rows(out: Path, wanted: set[tuple[str | int, int]]) -> dict[tuple[str | int, int], bytes]:
    """The file's lines by (id, sample), in its order."""
    rows: dict[tuple[str | int, int], bytes] = {}
    whole = 0
    with out.open("rb") as file:
        for line in file:
            row = _parsed(line)
            if row is None:
                break
            key = (row.get("id"), row.get("sample"))
            if key not in wanted or key in rows:
                raise InputError(
                    f"{out}:{len(rows) + 1} does not answer a prompt of --prompts, or answers it a second time; "
                    "remove the file or give another --out."
                )
            rows[key] = line
            whole += len(line)
        rest = file.read()
    if rest.strip():
        raise InputError(
            f"{out}:{len(rows) + 1} is not a row of answers; remove the file or give another --out."
        )
    if whole < out.stat().st_size:
        os.truncate(out, whole)
    return rows


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The row in a line, or None for a line that was not written to its end."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def answer_row(
    sample: Sample, prompt: Prompt, loaded: LoadedModel, *, in_thought: bool = False
) -> dict[str, Any]:
    """One row of the output; `in_thought` says that the prompt ended with <think>.

    Raises:
      InputError: the model's numbers are not finite.
    """
    import numpy as np

    from posttrain_jax.rewards.thoughts import answer_text

    if not np.isfinite(sample.logprobs).all():
        raise InputError(
            f"{prompt.where}: the model's log-probabilities are not finite; its weights or --dtype cannot be right."
        )
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


def append(file: BinaryIO, row: dict[str, Any]) -> None:
    """Writes a row so that a kill can tear the last one only."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    file.write(text.encode("utf-8", "replace"))
    file.flush()


class Progress:
    """On stderr: a bar that is drawn anew in a terminal, a line every few seconds elsewhere."""

    def __init__(self, *, total: int, done: int) -> None:
        self._total = total
        self._first = self._done = done
        self._tokens = self._cut = 0
        self._start = self._said = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def add(self, sample: Sample) -> None:
        """Counts an answer, and says so if the last time is long enough ago."""
        self._done += 1
        self._tokens += len(sample.tokens)
        self._cut += sample.cut > 0
        now = time.monotonic()
        if now - self._said >= (0.2 if self._terminal else PROGRESS_SECONDS) and self._done < self._total:
            self._said = now
            left = (now - self._start) / (self._done - self._first) * (self._total - self._done)
            text = f"{self._done}/{self._total} answers, {self._rate(now)}, {left:.0f} s left"
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
        """Says that all is written."""
        now = time.monotonic()
        cut = f" {self._cut} answers are to prompts whose start was left out." if self._cut else ""
        print(
            f"{chr(13) + chr(27) + '[K' if self._terminal else ''}done: {self._done} answers in {out}; "
            f"{self._tokens} tokens in {now - self._start:.1f} s, {self._rate(now)}.{cut}",
            file=sys.stderr,
        )

    def _rate(self, now: float) -> str:
        return f"{self._tokens / max(now - self._start, 1e-9):.1f} tokens/s"


if __name__ == "__main__":
    define_flags()
    entry.run(main, example=EXAMPLE)
