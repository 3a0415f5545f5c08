"""Which of two models writes better completions? A judge is shown both completions of every prompt, in both orders.

--a and --b are files that launch.generate wrote for the same prompts; they are paired by id and sample. Of a completion
the judge sees what follows its thought: nothing of one that was cut off inside. The prompt is a row's own column
`prompt` or `messages` (so a file of reference answers can be an opponent), else what --prompts or the file that
FILE.options.json names has under its id.

--judge is the URL of an OpenAI-compatible server, with the model's name in --judge_model; or a MODEL of ours, judged by
its log-probabilities of "A" and "B"; or a reward model, whose higher score wins. The key of a server is read from
$JUDGE_API_KEY. Every reply is kept in OUT/judge_cache.jsonl: start again after a kill or a failure, and only what is
missing is asked for.

Prints a table; writes judgments.jsonl (every pair, with what the judge said) and then result.json. All numbers are of B
over A: win rate with a 95 % interval, also controlled for length, sign and permutation test, and position bias.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import entry
from launch.completion_file import options_path
from launch.evaluate import show_progress
from launch.generate import file_sha256
from launch.prompt_file import PromptFileRow, prompt_of_row, read_prompts
from posttrain_jax.core.errors import InputError, without_secrets

if TYPE_CHECKING:
    from posttrain_jax.data.sources import Row
    from posttrain_jax.rewards.judge import Judge, Judged, Pair, Usage

EXAMPLE = (
    "python -m launch.win_rate --a=base.jsonl --b=tuned.jsonl --judge=http://127.0.0.1:8000/v1 "
    "--judge_model=NAME --out=runs/tuned-against-base"
)
KEY_VARIABLE = "JUDGE_API_KEY"
URLS = ("http://", "https://")
FILES = ("judgments.jsonl", "result.json")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say; see `define_flags`."""

    a: str
    b: str
    judge: str
    out: str
    judge_model: str = ""
    prompts: str = ""
    cache: str = ""
    max_tokens: int = 16
    parallel: int = 8
    retries: int = 5
    timeout: float = 120.0
    price_prompt: float = 0.0
    price_completion: float = 0.0
    dtype: str = "float32"
    batch_rows: int = 8
    resamples: int = 10_000
    seed: int = 0


def define_flags() -> None:
    """The command line; not at import, so that modules with like-named flags can be imported together."""
    flags.DEFINE_string("a", None, "JSON Lines of completions, as launch.generate writes them.")
    flags.DEFINE_string("b", None, "Another one, to the same prompts; the win rate is of b over a.")
    flags.DEFINE_string("judge", None, "URL of an OpenAI-compatible server, a MODEL, or a reward model.")
    flags.DEFINE_string("out", None, "Folder for result.json, judgments.jsonl and the cache.")
    flags.DEFINE_string("judge_model", "", "What the server calls the model.")
    flags.DEFINE_string("prompts", "", "The prompts; default: what a.options.json and b.options.json name.")
    flags.DEFINE_string("cache", "", "What the judge said; default: judge_cache.jsonl in --out.")
    flags.DEFINE_integer("max_tokens", Options.max_tokens, "Most tokens of a server's reply.")
    flags.DEFINE_integer("parallel", Options.parallel, "Questions that a server is asked at a time.")
    flags.DEFINE_integer("retries", Options.retries, "How often a server is asked again, with growing waits.")
    flags.DEFINE_float("timeout", Options.timeout, "Seconds that a server's reply may take.")
    flags.DEFINE_float("price_prompt", 0.0, "Of a million tokens that the judge reads, for the cost.")
    flags.DEFINE_float("price_completion", 0.0, "Of a million tokens that the judge writes.")
    flags.DEFINE_string("dtype", Options.dtype, "float32 or bfloat16, for a MODEL as the judge.")
    flags.DEFINE_integer("batch_rows", Options.batch_rows, "Rows of a batch, for a MODEL as the judge.")
    flags.DEFINE_integer("resamples", Options.resamples, "Of the bootstrap and of the permutation test.")
    flags.DEFINE_integer("seed", Options.seed, "Of both.")


def main(argv: Sequence[str]) -> int:
    """Judges, prints and writes."""
    del argv
    given = flags.FLAGS
    if None in (given.a, given.b, given.judge, given.out):
        raise InputError(f"--a, --b, --judge and --out are needed; an example: {EXAMPLE}")
    values: dict[str, Any] = {field.name: given[field.name].value for field in dataclasses.fields(Options)}
    entry.set_up_jax()
    compare(Options(**values))
    return 0


def compare(options: Options) -> dict[str, Any]:
    """Judges the pairs that the cache does not know; what it returns is also in result.json.

    Raises:
      InputError: a bad flag, files that do not belong together, or a judge that cannot be asked; what was judged until
        then is in the cache.
    """
    from posttrain_jax.evaluate.win_rate import table, win_rate
    from posttrain_jax.rewards.judge import VERSION, Cache, judge_pairs

    if options.resamples < 1:
        raise InputError(f"--resamples is {options.resamples}; it must be at least 1.")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}; it must be 0 or more.")
    pairs = read_pairs(options)
    empty = sum(not pair.a.strip() for pair in pairs), sum(not pair.b.strip() for pair in pairs)
    if any(empty):
        print(
            f"{empty[0]:,} completions of a and {empty[1]:,} of b are empty, or were cut off inside their thought."
        )
    out = Path(options.out).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {out} cannot be made: {error.strerror}.") from error
    if is_reward_judge(options):
        judged = judge_by_scores(options, pairs, out)
    else:
        cache = Cache(Path(options.cache).expanduser() if options.cache else out / "judge_cache.jsonl")
        judged = judge_pairs(make_judge(options), pairs, cache, progress=show_progress)
    result = win_rate(judged.judgments, resamples=options.resamples, seed=options.seed)
    cost = judged.usage.cost(price_prompt=options.price_prompt, price_completion=options.price_completion)
    record = {
        "a": options.a,
        "b": options.b,
        "judge": without_secrets(options.judge),
        "judge_model": options.judge_model or None,
        "template": VERSION,
        "resamples": options.resamples,
        "seed": options.seed,
        "b_over_a": dataclasses.asdict(result),
        "usage": {**dataclasses.asdict(judged.usage), "cost": cost},
    }
    write(out, record, judged)
    print(table(result, a=options.a, b=options.b))
    print(usage_line(judged.usage, cost))
    print(f"Written to {out / FILES[1]} and {out / FILES[0]}.")
    return record


def usage_line(usage: Usage, cost: float) -> str:
    """What this run took, in a line."""
    line = (
        f"{usage.calls:,} questions asked, {usage.cache_hits:,} answered before; {usage.prompt_tokens:,} tokens read "
        f"and {usage.completion_tokens:,} written by the judge"
    )
    return f"{line}, cost {cost:.4f}" if cost else line


def is_reward_judge(options: Options) -> bool:
    """Whether --judge is a reward model.

    Raises:
      InputError: there is no such model, or it has a name as on a server.
    """
    from posttrain_jax.models.io.source import is_reward_model, resolve

    if options.judge.startswith(URLS):
        return False
    if options.judge_model:
        raise InputError(
            "--judge_model is for a judge behind a URL; --judge names a MODEL here. Leave one out."
        )
    return is_reward_model(resolve(options.judge))


def judge_by_scores(options: Options, pairs: list[Pair], out: Path) -> Judged:
    """What a reward model (or an ensemble, by the mean of its members) thinks of the pairs.

    Raises:
      InputError: a bad flag, or a completion that cannot be scored.
    """
    from posttrain_jax.core.sharding import make_mesh
    from posttrain_jax.models.io.load import load_members
    from posttrain_jax.rewards.ensemble import Ensemble
    from posttrain_jax.rewards.judge_reward import judge_by_reward

    if options.batch_rows < 1:
        raise InputError(f"--batch_rows is {options.batch_rows}; it must be at least 1.")
    mesh = make_mesh()
    members = load_members(options.judge, dtype=options.dtype, param_dtype=options.dtype, mesh=mesh)
    rows = out / "scored_answers.jsonl"
    return judge_by_reward(members, pairs, rows, mesh, ensemble=Ensemble(), batch_rows=options.batch_rows)


def make_judge(options: Options) -> Judge:
    """The judge that the flags name.

    Raises:
      InputError: there is no such model, or a flag for it is bad.
    """
    if options.judge.startswith(URLS):
        from posttrain_jax.rewards.judge_endpoint import Endpoint, EndpointJudge

        if not options.judge_model:
            raise InputError(
                "--judge is a URL, so --judge_model is needed: the name that the server has for it."
            )
        return EndpointJudge(
            Endpoint(
                url=options.judge,
                model=options.judge_model,
                api_key=os.environ.get(KEY_VARIABLE, ""),
                max_tokens=options.max_tokens,
                parallel=options.parallel,
                retries=options.retries,
                timeout=options.timeout,
            )
        )
    import jax

    from posttrain_jax.core.sharding import make_mesh
    from posttrain_jax.models.io.load import load_model
    from posttrain_jax.rewards.judge_model import ModelJudge

    mesh = make_mesh() if jax.device_count() > 1 else None
    loaded = load_model(options.judge, dtype=options.dtype, param_dtype=options.dtype, mesh=mesh)
    return ModelJudge(loaded, batch_rows=options.batch_rows, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class GeneratedRow:
    """One row of completions: where it stands, its text without the thought, and the prompt as text and as it was."""

    where: str
    text: str
    request: str
    prompt_row: Any


Key = tuple[str | int, int]


def read_pairs(options: Options) -> list[Pair]:
    """The two files, paired by id and sample, in the order of `a`.

    Raises:
      InputError: a file is missing, a row is no completion, a completion has no partner, or the two have different
        things; names file and line.
    """
    from posttrain_jax.rewards.judge import Pair

    a, b = read_answers(options.a, options.prompts), read_answers(options.b, options.prompts)
    for name, here, other, there in (("--a", a, "--b", b), ("--b", b, "--a", a)):
        alone = [key for key in here if key not in there]
        if alone:
            key = alone[0]
            raise InputError(
                f"{here[key].where}: id {key[0]!r}, sample {key[1]} is not in {other}, like {len(alone)} of the "
                f"{len(here)} completions of {name}; generate both from the same prompts, to the end."
            )
    pairs = []
    for key, completion in a.items():
        rival = b[key]
        if completion.request != rival.request:
            raise InputError(
                f"{rival.where}: id {key[0]!r} is of another prompt than {completion.where} is; generate both from the "
                "same prompts."
            )
        pairs.append(
            Pair(
                key[0],
                key[1],
                completion.where,
                completion.request,
                completion.text,
                rival.text,
                completion.prompt_row,
            )
        )
    return pairs


def read_answers(path: str, prompts: str) -> dict[Key, GeneratedRow]:
    """The completions of a file, by id and sample.

    Args:
      path: what launch.generate wrote.
      prompts: the prompts; "" = what `path`.options.json names.

    Raises:
      InputError: the file is missing or empty, a row is no completion, or whose prompts are not known; names file and
        line.
    """
    from posttrain_jax.data.sources import RowError, read_rows
    from posttrain_jax.rewards.thoughts import after_thought, opens_thought

    if not Path(path).expanduser().is_file():
        raise InputError(f"{path}: there is no such file; give one that launch.generate wrote.")
    prompt_of: dict[str | int, PromptFileRow] | None = None
    completions: dict[Key, GeneratedRow] = {}
    for row in read_rows(path):
        where = f"{row.source}:{row.line}"
        try:
            key, text, in_thought = _checked(row)
            if key in completions:
                raise RowError(
                    "id", f"is {key[0]!r} with sample {key[1]}, which {completions[key].where} has already"
                )
            if row.value.get("prompt") is None and row.value.get("messages") is None:
                prompt_of = prompts_of(path, prompts) if prompt_of is None else prompt_of
                prompt = prompt_of.get(key[0])
            elif row.value.get("messages") is None:
                prompt = PromptFileRow(key[0], where, row.value)
            else:
                prompt = prompt_of_row(key[0], where, {"messages": row.value["messages"]})
            request = _request(prompt, key[0])
        except RowError as error:
            raise InputError(f"{where}: {error.column} {error.reason}.") from error
        assert prompt is not None  # _request refuses it
        messages = prompt.row.get("messages")
        words = prompt.row["prompt"] if messages is None else messages
        in_thought = in_thought or (isinstance(words, str) and opens_thought(words))
        completions[key] = GeneratedRow(
            where, after_thought(text, in_thought=in_thought) or "", request, words
        )
    return completions


def prompts_of(path: str, prompts: str) -> dict[str | int, PromptFileRow]:
    """The prompts of the completions in `path`, by id.

    Raises:
      InputError: it is not known, or the file that holds it is missing or bad.
    """
    columns, ignored, text_as = "", "", "plain"
    if not prompts:
        description = options_path(Path(path).expanduser())
        try:
            made = json.loads(description.read_text("utf-8"))
            prompts, sha256 = str(made["prompts"]), made.get("prompts_file_sha256")
            columns, ignored = str(made.get("columns", "")), str(made.get("ignore_columns", ""))
            text_as = str(made.get("text_as", "plain"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: its rows have no column prompt or messages, and {description.name} beside it does not name "
                "their prompts; give --prompts."
            ) from error
        if not Path(prompts).is_file():
            raise InputError(
                f"{description} names the prompts {prompts}, which are not there; give --prompts."
            )
        if sha256 is not None and file_sha256(Path(prompts)) != sha256:
            raise InputError(
                f"{prompts} was changed since {path} answered it; give the prompts as they were with --prompts."
            )
    return {
        prompt.id: prompt
        for prompt in read_prompts(
            prompts, text_as=text_as, columns=columns, ignore_columns=ignored, travels=True
        )
    }


def _checked(row: Row) -> tuple[Key, str, bool]:
    """Id and sample, the text, and whether it starts inside a thought. Raises RowError."""
    from posttrain_jax.data.sources import RowError

    if row.error is not None:
        raise row.error
    name, sample, text = row.value.get("id"), row.value.get("sample", 0), row.value.get("text")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise RowError("id", "is missing, or is no text or whole number")
    if isinstance(sample, bool) or not isinstance(sample, int):
        raise RowError("sample", "must be a whole number")
    if not isinstance(text, str):
        raise RowError(
            "text", "is missing, so there is nothing to judge (a model without a tokenizer writes none)"
        )
    in_thought = row.value.get("in_thought") or False
    if not isinstance(in_thought, bool):
        raise RowError("in_thought", "must be true or false")
    return (name, sample), text, in_thought


def _request(prompt: PromptFileRow | None, name: str | int) -> str:
    from posttrain_jax.data.sources import RowError
    from posttrain_jax.rewards.judge import request_text

    if prompt is None:
        raise RowError("id", f"is {name!r}, which no prompt has")
    request = request_text(prompt.row)
    if request is None:
        raise RowError(
            "the row", f"is of {prompt.where}, which has no text that a judge can read, only prompt_ids"
        )
    return request


def write(out: Path, record: dict[str, Any], judged: Judged) -> None:
    """Both files, each renamed into place when whole; result.json last."""
    lines = [
        json.dumps(
            {
                **dataclasses.asdict(judgment),
                "preference": judgment.preference,
                "said_a_first": replies[0],
                "said_b_first": replies[1],
            }
        )
        for judgment, replies in zip(judged.judgments, judged.replies, strict=True)
    ]
    texts = ("\n".join(lines), json.dumps(record, indent=2, allow_nan=False))
    try:
        for name, text in zip(FILES, texts, strict=True):
            partial = out / f"{name}.partial"
            partial.write_text(text + "\n", "utf-8", errors="replace")
            partial.replace(out / name)
    except OSError as error:
        raise InputError(f"The results cannot be written to {out}: {error.strerror}.") from error


if __name__ == "__main__":
    define_flags()
    entry.run(main, example=EXAMPLE)
