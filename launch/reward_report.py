"""How good is a reward model? Accuracy, calibration, length bias and raters, on data like its training data and others.

--model is the workdir of a reward model's run or of an ensemble, or a Hugging Face ...ForSequenceClassification.
Without --data the split `in_distribution` is what a workdir's run held out, tokenized as it did; with --data it is
those rows, or with --held_out=split:60 --seed=0 the part of them that a run with that seed would have held out.
--out_of_distribution=NAME=DATA,... are further splits. Only comparisons count (see `posttrain_jax/data/preferences.py`
for the formats). Where a completion does not fit into --max_length, a workdir's run says what happens (data.truncate);
elsewhere its prompt is left out, and counted.

An ensemble's scores are combined for each completion: their mean, their lowest, or (uncertainty) their mean less
--coefficient times their variance. Prints a table; writes report.json, report.md, plots, and rows.jsonl with the
scores of every pair and how far an ensemble's members are apart. Rows with a `subset` are also counted by it, and
--sections joins subsets to sections, in splits that hold all of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import entry
from posttrain_jax.core.errors import InputError

if TYPE_CHECKING:
    from posttrain_jax.data.preference_groups import PreferenceData
    from posttrain_jax.evaluate.own_data import HeldOutData
    from posttrain_jax.models.io.load import LoadedModel

EXAMPLE = (
    "python -m launch.reward_report --model=runs/reward --out=runs/reward-report "
    "--out_of_distribution=summaries=asset:factual_summary_pairs"
)
IN_DISTRIBUTION = "in_distribution"
MAX_LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say; see `define_flags`."""

    model: str
    out: str
    data: str = ""
    held_out: str = ""
    seed: int | None = None
    out_of_distribution: tuple[str, ...] = ()
    combine: str = "mean"
    coefficient: float = 0.0
    max_length: int = 0
    batch_rows: int = 8
    dtype: str = "float32"
    resamples: int = 2000
    sections: str = ""


def define_flags() -> None:
    """The command line; not at import, so that modules with like-named flags can be imported together."""
    flags.DEFINE_string("model", None, "A reward model: a workdir, or a Hugging Face folder or name.")
    flags.DEFINE_string("out", None, "Folder for report.json, report.md and the plots.")
    flags.DEFINE_string("data", "", "Preference data; default: what the workdir's run held out.")
    flags.DEFINE_string("held_out", "", 'The part of --data that a run with data.eval="split:..." holds out.')
    flags.DEFINE_integer("seed", None, "Of that run; default: the workdir's, else 0.")
    flags.DEFINE_list("out_of_distribution", [], "Further splits, NAME=DATA, with commas between them.")
    flags.DEFINE_string("combine", Options.combine, "The members of an ensemble: mean, min or uncertainty.")
    flags.DEFINE_float("coefficient", Options.coefficient, "Of the variance, with --combine=uncertainty.")
    flags.DEFINE_integer(
        "max_length",
        Options.max_length,
        f"Tokens of prompt and completion; 0 = the run's, else {MAX_LENGTH}.",
    )
    flags.DEFINE_integer("batch_rows", Options.batch_rows, "Prompts scored at once.")
    flags.DEFINE_string("dtype", Options.dtype, "float32 or bfloat16, for weights and arithmetic.")
    flags.DEFINE_integer("resamples", Options.resamples, "Of the bootstrap.")
    flags.DEFINE_string(
        "sections",
        Options.sections,
        'A JSON file {"section": ["subset", ...]}: scores of sections and their mean, as RewardBench has them; '
        '{"section": {"subset": count}} gives subsets other weights than their numbers of pairs.',
    )


def main(argv: Sequence[str]) -> int:
    """Scores, prints and writes."""
    del argv
    given = flags.FLAGS
    if given.model is None or given.out is None:
        raise InputError(f"--model and --out are needed; an example: {EXAMPLE}")
    values: dict[str, Any] = {field.name: given[field.name].value for field in dataclasses.fields(Options)}
    values["out_of_distribution"] = tuple(values["out_of_distribution"])
    entry.set_up_jax()
    report(Options(**values))
    return 0


def report(options: Options) -> dict[str, Any]:
    """Scores all splits; what it returns is also in OUT/report.json.

    Raises:
      InputError: a bad flag, a language model, data that cannot be read or hold no comparison.
    """
    from posttrain_jax.core.sharding import make_mesh, shard_multiple
    from posttrain_jax.evaluate.own_data import run_config
    from posttrain_jax.evaluate.reward_report import reward_report
    from posttrain_jax.evaluate.reward_report_files import write_report, write_rows
    from posttrain_jax.evaluate.score_pairs import score_pairs
    from posttrain_jax.models.io.load import load_members
    from posttrain_jax.rewards.ensemble import Ensemble
    from posttrain_jax.wiring.data import share_prompt

    ensemble = Ensemble(options.combine, options.coefficient)
    if options.batch_rows < 1:
        raise InputError(f"--batch_rows is {options.batch_rows}; it must be at least 1.")
    if options.resamples < 0:
        raise InputError(f"--resamples is {options.resamples}; it must be 0 (no intervals) or more.")
    further = read_names(options.out_of_distribution)
    if options.seed is not None and options.seed < 0:
        raise InputError(f"--seed is {options.seed}; it must be 0 or more.")
    sections, section_counts = read_sections(options.sections)
    mesh = make_mesh()
    members = load_members(options.model, dtype=options.dtype, param_dtype=options.dtype, mesh=mesh)
    run = run_config(members[0])
    first = in_distribution(options, run)
    for name, source in {IN_DISTRIBUTION: first.text(), **further}.items():
        print(f"data: {name}: {source}", flush=True)
    splits = read_splits(options, members[0], run, first, further)
    for data in splits.values():
        print(data.text())
    scored = score_pairs(
        members,
        splits,
        mesh,
        ensemble=ensemble,
        groups=shard_multiple(options.batch_rows, mesh),
        share_prompt=share_prompt("auto", members[0].model.module.implementation),
    )
    step = members[0].source.step
    about = {"model": options.model if step is None else f"{options.model}, step {step}"}
    if len(members) > 1:
        weight = f" ({options.coefficient:g} times the variance)" if options.coefficient else ""
        about["ensemble"] = f"{len(members)} members, combined by {options.combine}{weight}"
    about |= {IN_DISTRIBUTION: first.text(), **further}
    if scored[0].gain != 1:
        about["scale"] = (
            f"loss and calibration are of margins divided by the scores' gain, {scored[0].gain:.4g}"
        )
    result = reward_report(
        scored,
        sections=sections,
        section_counts=section_counts,
        resamples=options.resamples,
        seed=first.seed,
        about=about,
    )
    out = Path(options.out).expanduser()
    try:
        write_report(result, out)
        write_rows(scored, out)
    except OSError as error:
        raise InputError(f"--out={out} cannot be written: {error.strerror}.") from error
    print(table(result))
    print(f"Written to {out / 'report.md'}; report.json, rows.jsonl and plots lie beside it.")
    return result


def in_distribution(options: Options, run: dict[str, Any] | None) -> HeldOutData:
    """What --data and --held_out say, or what the run held out.

    Raises:
      InputError: neither says anything, or they contradict.
    """
    from posttrain_jax.data.split import split_amount
    from posttrain_jax.evaluate.own_data import HeldOutData, held_out_by

    seed = options.seed if options.seed is not None else 0 if run is None else run["seed"]
    if options.held_out and split_amount(options.held_out) is None:
        raise InputError(
            f"--held_out is {options.held_out!r}; write split:60 (prompts) or split:0.1 (a share of them)."
        )
    if options.data:
        return HeldOutData(options.data, options.held_out, seed)
    if options.held_out:
        raise InputError(
            "--held_out is a part of --data; give both, or neither for what a workdir's run held out."
        )
    if run is None:
        raise InputError(f"--data is needed: {options.model} is no workdir, so it names no data of its own.")
    if not run["data"]["eval"]:
        raise InputError(
            f"--data is needed: the run in {options.model} held nothing out (its data.eval is empty)."
        )
    if seed != run["seed"]:
        raise InputError(
            f"--seed is {seed}, and the run in {options.model} held its rows out with seed {run['seed']}: another seed "
            "would take rows that it was trained on; leave --seed out, or give --data."
        )
    return held_out_by(run, options.model)


def read_names(given: Sequence[str]) -> dict[str, str]:
    """NAME=DATA as {NAME: DATA}.

    Raises:
      InputError: an item is no NAME=DATA, or a name stands twice.
    """
    named: dict[str, str] = {}
    for item in given:
        name, equals, data = item.partition("=")
        if not (name and equals and data):
            raise InputError(
                f"--out_of_distribution: {item!r} is not NAME=DATA, such as hhh=asset:hhh_alignment."
            )
        if name in named or name == IN_DISTRIBUTION:
            raise InputError(f"--out_of_distribution: two splits are called {name!r}; name each once.")
        named[name] = data
    return named


def read_sections(path: str) -> tuple[dict[str, list[str]], dict[str, float]]:
    """--sections: section -> its subsets, and subset -> the count that the file gives it; empty without the flag.

    Raises:
      InputError: the file cannot be read or holds something else, a section without subsets, two counts of a subset.
    """
    if not path:
        return {}, {}
    try:
        sections = json.loads(Path(path).expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--sections={path} cannot be read: {error}.") from error
    if not isinstance(sections, dict) or not sections:
        raise InputError(f'--sections={path} holds something else than {{"section": ["subset", ...], ...}}.')
    counts: dict[str, float] = {}
    for section, subsets in sections.items():
        named = isinstance(subsets, list) and all(isinstance(name, str) for name in subsets)
        if not subsets or not (named or _are_counts(subsets)):
            raise InputError(
                f"--sections={path}: the section {section!r} is no list of subsets and no object of subsets with their "
                'counts; write ["subset", ...] or {"subset": 10, ...}, at least one.'
            )
        for name, count in subsets.items() if isinstance(subsets, dict) else ():
            if counts.setdefault(name, count) != count:
                raise InputError(
                    f"--sections={path}: the subset {name!r} has two counts, {counts[name]:g} and {count:g}; give it "
                    "one."
                )
    return {section: list(subsets) for section, subsets in sections.items()}, counts


def _are_counts(value: Any) -> bool:
    """Whether it is {subset: a number above 0}."""
    return isinstance(value, dict) and all(
        isinstance(count, int | float) and not isinstance(count, bool) and math.isfinite(count) and count > 0
        for count in value.values()
    )


def read_splits(
    options: Options,
    loaded: LoadedModel,
    run: dict[str, Any] | None,
    first: HeldOutData,
    further: dict[str, str],
) -> dict[str, PreferenceData]:
    """The data of every split, by its name, tokenized by the model's tokenizer and, of a workdir, by the run's rules.

    Raises:
      InputError: the model has no tokenizer, or data cannot be read.
    """
    from posttrain_jax.data.split import hold_out, split_amount
    from posttrain_jax.data.tokenized import TokenizeOptions
    from posttrain_jax.data.tokenized_preferences import build_preferences
    from posttrain_jax.evaluate.own_data import run_rules
    from posttrain_jax.sampling.prompts import need_tokenizer
    from posttrain_jax.wiring.data import data_spec

    tokenizer = need_tokenizer(loaded)
    # The run's chat template is its tokenizer's by now.
    rules = TokenizeOptions(max_length=MAX_LENGTH, truncate="drop")
    if run is not None:
        rules = run_rules(loaded, run)
    if options.max_length:
        rules = dataclasses.replace(rules, max_length=options.max_length)
    data = build_preferences(data_spec(first.data), tokenizer, rules)
    if first.part:
        amount = split_amount(first.part)
        assert amount is not None  # in_distribution asked
        data = hold_out(data, amount, seed=first.seed)[1]
    others = {name: build_preferences(data_spec(spec), tokenizer, rules) for name, spec in further.items()}
    return {IN_DISTRIBUTION: data, **others}


def table(result: dict[str, Any]) -> str:
    """The splits with their accuracy, loss, calibration error and how score goes with length."""
    header = ("split", "pairs", "accuracy", "loss", "calibration error", "score and length")
    rows = [header]
    for name, part in result["splits"].items():
        accuracy, spearman = part["accuracy"], part["length"]["spearman"]
        rows.append(
            (
                name,
                f"{part['pairs']:,}",
                f"{accuracy['value']:.1%} ({accuracy['low']:.1%} to {accuracy['high']:.1%})",
                f"{part['loss']:.4f}",
                f"{part['calibration']['expected_calibration_error']:.4f}",
                "-" if spearman is None else f"{spearman:+.3f}",
            )
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    define_flags()
    entry.run(main, example=EXAMPLE)
