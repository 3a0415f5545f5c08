"""The `--config` flag: one file per experiment, overridden key by key, with one line for every mistake."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from posttrain_jax.core.errors import InputError, without_secrets
from posttrain_jax.models.config import LoraConfig

# Keys of earlier versions, and what they are called now; the config.json of a run from before is read as such.
RENAMED = {
    "score.normalise": "score.normalize",
    "score.join": "score.aggregate",
    "score.combine": "score.ensemble",
    "score.missing_end": "score.missing_eos",
    "score.missing_end_value": "score.missing_eos_value",
    "score.answers_per_call": "score.completions_per_call",
    "reward.normalise": "reward.normalize",
    "reward.centre": "reward.center",
    "dpo.skip_end": "dpo.skip_eos",
}


def define(default: str | None = None) -> flags.FlagHolder:
    """Defines `--config=FILE.py[:variant]` with `--config.key=value` overrides; the config is locked."""
    return config_flags.DEFINE_config_file(
        "config",
        default,
        "Experiment: FILE.py or FILE.py:variant; --config.key=value changes a key.",
        lock_config=True,
    )


def check_arguments(argv: Sequence[str]) -> None:
    """Checks `--config` and its overrides before absl does, to say clearly what is wrong.

    Raises:
      InputError: the file is missing or fails, the variant or a key is unknown, a value has the wrong type.
    """
    given = _flags(argv)
    files = [value for name, value in given if name == "config" and value is not None]
    if not files:
        return
    known = flatten(load_file(files[-1]))
    for name, text in given:
        if not name.startswith("config."):
            continue
        key = re.sub(r"\[\d+\]$", "", name.removeprefix("config."))
        if key in RENAMED:
            raise InputError(
                f"The config key {key!r} is called {RENAMED[key]!r} now; write --config.{RENAMED[key]}=..."
            )
        if key in known:
            _check_value(key, text, known[key])
            continue
        sections = sorted({name.rsplit(".", 1)[0] for name in known if "." in name})
        near = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.0)
        raise InputError(f"There is no config key {key!r} in {files[-1]}; the nearest is {near[0]!r}.")


def _flags(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """Every `--name=value`, `--name value` and `--name` (value None) of a command line."""
    given = []
    for place, word in enumerate(argv):
        if not word.startswith("-"):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        following = argv[place + 1] if place + 1 < len(argv) and not argv[place + 1].startswith("-") else None
        given.append((name, value if equals else following))
    return given


def _check_value(key: str, text: str | None, default: Any) -> None:
    if text is None:
        if not isinstance(default, bool):
            raise InputError(f"--config.{key} needs a value: --config.{key}=VALUE.")
    elif isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise InputError(f"config.{key} is {text!r}, but must be true or false.")
    elif isinstance(default, int | float):
        kind = "a whole number" if isinstance(default, int) else "a number"
        try:
            (int if isinstance(default, int) else float)(text)
        except ValueError:
            raise InputError(
                f"config.{key} is {text!r}, but must be {kind} (its default is {default})."
            ) from None


def load_file(spec: str) -> ConfigDict:
    """Runs `get_config(variant)` of FILE.py[:variant].

    Raises:
      InputError: no such file, no get_config in it, or a variant that it does not have.
    """
    name, _, variant = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(
            name, [str(p) for p in sorted(Path("configs").rglob("*.py"))], n=1, cutoff=0.0
        )
        hint = f"; the nearest is {near[0]}" if near else ""
        raise InputError(f"There is no config file {name}{hint} (run from the repository's root).")
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


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


# Keys that may differ from those a workdir was started with: they change how a run is carried out, not what it is.
FREE_KEYS = (
    "mesh.",
    "log.",
    "checkpoint.",
    "eval.batch_rows",
    "train.micro_rows",
    "train.remat",
    "train.max_skipped",
    "rollout.batch_size",
    "rollout.max_logp_difference",
    "score.workers",
    "score.seconds",
)


# Keys that may change from a checkpoint on where --allow_change names them: the state that was saved fits all values.
CHANGEABLE = (
    "optim.lr",
    "optim.schedule",
    "optim.warmup",
    "optim.warmup_start",
    "optim.min_lr_ratio",
    "optim.decay_share",
    "optim.beta1",
    "optim.beta2",
    "optim.eps",
    "optim.weight_decay",
    "optim.clip_norm",
    "train.steps",
    "train.epochs",
    "data.eval",
    "eval.",
    "stop.",
)
# Of these the best checkpoint so far was judged by: with another value it could not be compared.
JUDGED_BY = ("data.eval", "eval.weights", "eval.temperature")


# key: (least, greatest) value that makes sense, both included; not every algorithm has every key.
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "model.lora.rank": (0, math.inf),
    "data.max_length": (2, math.inf),
    "train.steps": (0, math.inf),
    "train.epochs": (0, math.inf),
    "train.rows_per_step": (1, math.inf),
    "train.micro_rows": (0, math.inf),
    "train.max_skipped": (1, math.inf),
    "optim.warmup": (0, math.inf),
    "optim.warmup_start": (0, 1),
    "optim.min_lr_ratio": (0, 1),
    "optim.decay_share": (0, 1),
    "optim.beta1": (0, 0.9999999),
    "optim.beta2": (0, 0.9999999),
    "optim.eps": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "optim.momentum": (0, 1),
    "optim.clip_norm": (0, math.inf),
    "data.prompt_tokens": (0, math.inf),
    "dpo.alpha": (0, math.inf),
    "dpo.gamma": (0, math.inf),
    "dpo.eta": (0, math.inf),
    "dpo.nll_weight": (0, math.inf),
    "reward.center": (0, math.inf),
    "reward.margin_scale": (0, math.inf),
    "rollout.batch_size": (0, math.inf),
    "rollout.truncate_after": (0, math.inf),
    "rollout.max_logp_difference": (0, math.inf),
    "score.completions_per_call": (1, math.inf),
    "score.clip": (0, math.inf),
    "score.normalize": (0, math.inf),
    "stop.kl": (0, math.inf),
    "stop.entropy": (0, math.inf),
    "stop.repetition": (0, 1),
    "stop.gold_errors": (0, math.inf),
    "log.every": (1, math.inf),
    "eval.every": (0, math.inf),
    "eval.batch_rows": (1, math.inf),
    "eval.max_new_tokens": (1, math.inf),
    "eval.temperature": (-1, math.inf),
    "checkpoint.every": (0, math.inf),
    "checkpoint.keep": (1, math.inf),
}


def check_values(config: ConfigDict) -> None:
    """Checks what can be checked before anything is read: ranges, keys that have no default, names of layers.

    Raises:
      InputError: names the key, its value and what it may be.
    """
    flat = flatten(config)
    for key, (least, greatest) in BOUNDS.items():
        if key in flat and not least <= flat[key] <= greatest:
            limit = (
                f"at least {least:g}" if greatest == math.inf else f"between {least:g} and {greatest:.10g}"
            )
            raise InputError(f"{key} is {flat[key]}; it must be {limit}.")
    for key, what in (("model.init", 'a MODEL, or "random"'), ("data.train", "the rows to train on")):
        if not flat[key]:
            raise InputError(f"{key} is not set; it must be {what}.")
    if config.eval.weights not in ("raw", "ema"):
        raise InputError(f"eval.weights is {config.eval.weights!r}; use raw (the last weights) or ema.")
    if config.eval.weights == "ema" and not config.optim.ema:
        raise InputError(
            "eval.weights is 'ema', but optim.ema is 0, so no moving average of the weights is kept."
        )
    targets, known = set(config.model.lora.targets), LoraConfig().targets
    if config.model.lora.rank and (not targets or not targets <= set(known)):
        raise InputError(f"model.lora.targets is {tuple(sorted(targets))}; use some of {', '.join(known)}.")


@dataclasses.dataclass(frozen=True)
class Change:
    """A key that a run goes on with another value of; None = it was, or is, not there."""

    key: str
    before: Any
    now: Any

    def text(self) -> str:
        """Both values, for a person."""
        then, now = ("absent" if value is None else repr(value) for value in (self.before, self.now))
        return f"{self.key} ({then} then, {now} now)"


def resolve(config: ConfigDict) -> dict[str, Any]:
    """The config as it is written: plain JSON values, without the secrets of URLs that reward functions are given."""
    resolved = json.loads(json.dumps(config.to_dict()))
    if "score" in resolved:
        resolved["score"]["arguments"] = without_secrets(resolved["score"]["arguments"])
    return resolved


def check_allowed(config: ConfigDict, allowed: Sequence[str]) -> None:
    """Whether the keys that --allow_change names are there.

    Raises:
      InputError: one is not; says the nearest.
    """
    known = flatten(config)
    for key in allowed:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"--allow_change={key}: there is no such key; the nearest is {near!r}.")


def changes(config: ConfigDict, workdir: Path, allowed: Sequence[str] = ()) -> list[Change]:
    """The keys that differ from those that the run in a workdir was started with, in order.

    Args:
      config: of this start.
      workdir: the run's folder, with a checkpoint to go on from.
      allowed: keys that may differ besides FREE_KEYS, of those in CHANGEABLE (or that the run's version had not).

    Raises:
      InputError: another key differs; names all that do, with both values, and what to do.
    """
    now = flatten(ConfigDict(resolve(config)))
    from posttrain_jax.core.log import log_on_host0

    before = _saved(workdir / "config.json")
    if before is None:
        log_on_host0(f"{workdir / 'config.json'} is gone; the run goes on with the config of this start.")
        return []
    found = [
        Change(key, _plain(before.get(key)), _plain(now.get(key)))
        for key in sorted(before.keys() | now.keys())
        if _plain(before.get(key)) != _plain(now.get(key))
    ]
    refused = [
        change for change in found if not change.key.startswith(FREE_KEYS) and change.key not in allowed
    ]
    if refused:
        could = [change.key for change in refused if _may_change(change)]
        advice = f", or --allow_change={','.join(could)} to go on with the new values" if could else ""
        raise InputError(
            f"{workdir} was started with another config: {'; '.join(change.text() for change in refused)}. "
            f"Use the same values to resume, or a new --workdir{advice if len(could) == len(refused) else ''}."
        )
    for change in found:
        if change.key in allowed:
            _check_change(change, config)
    return found


def _saved(path: Path) -> dict[str, Any] | None:
    """The flat config that a run wrote, or None."""
    if not path.is_file():
        return None
    try:
        saved = flatten(ConfigDict(json.loads(path.read_text("utf-8"))))
        saved = {RENAMED.get(key, key): value for key, value in saved.items()}
        if "score.arguments" in saved:  # an older run wrote them with their secrets
            saved["score.arguments"] = without_secrets(saved["score.arguments"])
        return saved
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is no config in JSON ({error}); restore it, or use a new --workdir."
        ) from error


def _may_change(change: Change) -> bool:
    return change.before is None or change.key.startswith(CHANGEABLE)


def _check_change(change: Change, config: ConfigDict) -> None:
    if not _may_change(change):
        raise InputError(
            f"--allow_change={change.key}: what was saved does not fit another value of it, so it cannot change in the "
            f"middle of a run; use a new --workdir. These can: {', '.join(name.rstrip('.') for name in CHANGEABLE)}."
        )
    if change.key == "data.eval" and any(
        str(value).startswith("split:") for value in (change.before, change.now)
    ):
        raise InputError(
            f"{change.text()}: a split takes its rows from the training data, which would be others; give a file."
        )
    if change.key in JUDGED_BY and config.checkpoint.best_metric:
        raise InputError(
            f'{change.text()}: the best checkpoint so far was judged by it; set checkpoint.best_metric to "", or use '
            "a new --workdir."
        )


def write(resolved: dict[str, Any], workdir: Path, *, step: int = 0, changed: Sequence[Change] = ()) -> None:
    """Writes `config.json`, and what has changed from `step` on into `config_history.jsonl`."""
    if changed:
        from posttrain_jax.core.log import log_on_host0

        log_on_host0(f"From step {step} on another config: {'; '.join(change.text() for change in changed)}.")
        values = {change.key: [change.before, change.now] for change in changed}
        line = {"step": step, "time": time.time(), "changes": values}
        with (workdir / "config_history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    path = workdir / "config.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(resolved, indent=2) + "\n")
    partial.replace(path)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
