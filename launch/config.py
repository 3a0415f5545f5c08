"""The `--config` flag: one file per experiment, overridden key by key, with one line for every mistake."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.core.installed import CONFIGS, ROOT, find_config
from posttrain_jax.core.schema import Leaf, all_leaves, flat_keys, from_text, unknown_key
from posttrain_jax.data.rows import one_line
from posttrain_jax.wiring.key_names import RENAMED, SYNONYMS


class _FileParser(flags.ArgumentParser):
    """Of `--config`."""

    def parse(self, spec: str) -> ConfigDict:
        return load_file(spec)


def define(default: str | None = None) -> flags.FlagHolder:
    """Defines `--config=FILE.py[:variant]`; `--config.key=value` overrides are taken by `take_overrides`."""
    return flags.DEFINE(
        _FileParser(),
        "config",
        default,
        "Experiment: FILE.py or FILE.py:variant. --config.KEY=VALUE changes a key, such as --config.optim.lr=1e-6.",
    )


@dataclasses.dataclass(frozen=True)
class Override:
    """A `--config.KEY=TEXT` of a command line; the text is None where it is missing."""

    key: str
    text: str | None


def take_overrides(argv: Sequence[str]) -> tuple[list[str], list[Override]]:
    """The command line without its overrides, and these, in order.

    A value can follow its flag as a word of its own; `--config.KEY` alone and `--noconfig.KEY` are of a key that is
    true or false, in the config of the algorithm that is given.

    Raises:
      InputError: overrides without a config, or there is no such algorithm.
    """
    words = list(argv)
    if not any(re.match(r"--?(no)?config\.", word) for word in words):
        return words, []
    spec, algorithm = _last_value(words, "config"), _last_value(words, "config.algorithm")
    if not spec:
        raise InputError("--config.KEY=VALUE changes a key of a config, and there is no --config=FILE.py.")
    flags_known = known_leaves(load_file(spec), algorithm)
    left, taken = [], []
    while words:
        word = words.pop(0)
        match = re.match(r"--?(no)?config\.([^=]*)(=?)(.*)", word, re.DOTALL)
        if match is None:
            left.append(word)
            if word == "--":
                break
            continue
        negated, key, equals, text = match.groups()
        leaf = flags_known.get(key)
        value: str | None = text if equals else None
        if negated:
            value = "false" if leaf is None or leaf.type is bool else None
        elif value is None and leaf is not None and leaf.type is bool:
            value = "true"
        elif value is None and words and not words[0].startswith("--"):
            value = words.pop(0)
        taken.append(Override(key, value))
    return [*left, *words], taken


def _last_value(words: Sequence[str], flag: str) -> str:
    """The last `--flag=VALUE` or `--flag VALUE`, "" where there is none."""
    last = ""
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == flag:
            last = value if equals else "" if after.startswith("--") else after
    return last


def override(config: ConfigDict, overrides: Sequence[Override]) -> ConfigDict:
    """The config with some keys changed, in order; several values of a key that takes a list are its items.

    `algorithm` comes first, for it decides which keys there are. Of train.steps and train.epochs the given one counts.

    Raises:
      InputError: there is no such key, a value is missing or of the wrong type.
    """
    given: dict[str, list[str | None]] = {}
    for one in overrides:
        given.setdefault(one.key, []).append(one.text)
    if "algorithm" in given and not _is_evaluation(config):
        algorithm = given.pop("algorithm")[-1]
        check_override("algorithm", algorithm, known_leaves(config))
        config = with_algorithm(config, str(algorithm))
    known = known_leaves(config)
    for key, texts in given.items():
        for text in texts:
            check_override(key, text, known)
        _put(config, key, _value(known.get(key), [str(text) for text in texts]))
    flat = flatten(config)
    for key, other in (("train.steps", "train.epochs"), ("train.epochs", "train.steps")):
        if key in given and other not in given and flat[key] and flat.get(other):
            print(f"{key}={flat[key]:g} is given, so the config's {other} does not count.", flush=True)
            _put(config, other, type(known[other].default)(0))
    return config


def with_algorithm(config: ConfigDict, algorithm: str) -> ConfigDict:
    """The config of another algorithm, with the values of all keys that both have; prints which others were set.

    Raises:
      InputError: there is no such algorithm, or neither has a key of the config.
    """
    from configs.base import experiment_config

    before, other = known_leaves(config), experiment_config(algorithm)
    if algorithm == config.get("algorithm", before["algorithm"].default):
        return config
    known, lost = known_leaves(other), []
    for key, value in flatten(config).items():
        if key in known:
            _put(other, key, value)
        elif key not in before:
            raise InputError(unknown_key(key, list(before), SYNONYMS))
        elif value != before[key].default:
            lost.append(f"{key}={shown(value, 40)}")
    if lost:
        print(
            f"algorithm={algorithm} has no such keys, so these do not count: {', '.join(lost)}.", flush=True
        )
    other.algorithm = algorithm
    return other


def known_leaves(config: ConfigDict, algorithm: str = "") -> dict[str, Leaf]:
    """Every key of the config of an experiment or an evaluation.

    Args:
      config: without an algorithm it is of the default one.
      algorithm: instead of the experiment's; "" = its own.

    Raises:
      InputError: there is no such algorithm, or no such task.
    """
    from posttrain_jax.evaluate.options import sections_of_task
    from posttrain_jax.wiring.algorithms import sections_of
    from posttrain_jax.wiring.experiment import RunOptions

    if _is_evaluation(config):
        return all_leaves(sections_of_task(config.eval.task))
    return all_leaves(sections_of(algorithm or config.get("algorithm", RunOptions.algorithm)))


def _is_evaluation(config: ConfigDict) -> bool:
    """Whether it is of `launch.evaluate`: an experiment's has no `eval.task`."""
    return "algorithm" not in config and isinstance(config.get("eval"), ConfigDict) and "task" in config.eval


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted keys to values."""
    return flat_keys(config.to_dict(), known_leaves(config))


def describe(config: ConfigDict) -> str:
    """Every key with its value, unit and default, what it means, and what it may be."""
    flat = flatten(config)
    lines = []
    for key, leaf in known_leaves(config).items():
        unit = f" {leaf.rule.unit}" if leaf.rule.unit else ""
        value = flat.get(key, leaf.default)
        default = "" if value == leaf.default else f"  (default {leaf.default!r})"
        lines.append(f"{key} = {value!r}{unit}{default}\n    {leaf.rule.help}; {leaf.allowed()}")
    return "\n".join(lines)


def check_override(key: str, text: str | None, known: Mapping[str, Leaf]) -> None:
    """Checks that there is such a key, and a value.

    Raises:
      InputError: says what is wrong, and what to write.
    """
    if key in RENAMED:
        raise InputError(
            f"The config key {key!r} is called {RENAMED[key]!r} now; write --config.{RENAMED[key]}=..."
        )
    listed = re.fullmatch(r"(.*?)(\[[^\]]*\]?)+", key)
    if listed is not None and listed[1] in known:
        raise InputError(
            f"--config.{key[:80]} names one item of a list; give the whole list, as JSON: "
            f'--config.{listed[1]}=\'["...", "..."]\'.'
        )
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        raise InputError(f"{key} is a section; give one of its keys, such as --config.{inside[0]}=...")
    if key not in known and _dictionary_of(key, known) is None:
        raise InputError(unknown_key(key, list(known), SYNONYMS))
    if text is None:
        raise InputError(f"--config.{key} needs a value: --config.{key}=VALUE.")


def _dictionary_of(key: str, known: Mapping[str, Leaf]) -> Leaf | None:
    """The key that takes a JSON object in which `key` lies, such as model.config of model.config.hidden_size."""
    above = key
    while "." in above:
        above = above.rpartition(".")[0]
        if above in known and type(known[above].default) is dict:
            return known[above]
    return None


def _value(leaf: Leaf | None, texts: Sequence[str]) -> Any:
    """What the texts given for a key stand for; without a leaf, inside a JSON object, JSON or else text."""
    if leaf is not None and leaf.type == tuple[str, ...]:
        return tuple(item for text in texts for item in from_text(leaf, text))
    if leaf is not None:
        return from_text(leaf, texts[-1])
    try:
        return json.loads(texts[-1])
    except (ValueError, RecursionError):
        return texts[-1]


def _put(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key; sections and JSON objects in which it lies are made where they are not there.

    Raises:
      InputError: it lies in something else.
    """
    *sections, name = key.split(".")
    place: Any = config
    with config.unlocked():
        for depth, section in enumerate(sections, 1):
            if section not in place:
                place[section] = {}
            place = place[section]
            if not isinstance(place, Mapping | ConfigDict):
                above = ".".join(sections[:depth])
                raise InputError(
                    f"{above[:80]} is {shown(place)}, so --config.{key[:80]} cannot be set in it; give the whole "
                    f"object, as JSON: --config.{above[:80]}='{{...}}'."
                )
        place[name] = value


def load_file(spec: str) -> ConfigDict:
    """Runs `get_config(variant)` of FILE.py[:variant].

    Raises:
      InputError: no such file, no get_config in it, or a variant that it does not have.
    """
    name, _, variant = spec.partition(":")
    try:
        path = find_config(name)
        is_file = path.is_file()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # too long, a null byte, a home folder that nobody has
        raise InputError(f"The config file {one_line(name, 100)!r} is no path: {error}.") from None
    if not is_file:
        shipped = [str(file.relative_to(ROOT)) for file in sorted((ROOT / CONFIGS).rglob("*.py"))]
        near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.0)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise InputError(f"There is no config file {name}{hint}.")
    module_spec = importlib.util.spec_from_file_location("experiment_config", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"The config {name} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return module.get_config(variant) if variant else module.get_config()
    except ValueError as error:
        raise InputError(f"The config {spec} cannot be made: {error}.") from error
    except InputError:
        raise
    except Exception as error:  # whatever the code in the file does
        raise InputError(f"The config {name} fails: {type(error).__name__}: {error}.") from error
