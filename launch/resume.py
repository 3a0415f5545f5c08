"""Starting a run again: its config.json, and which keys of it may differ."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from launch.config import known_leaves
from posttrain_jax.core.errors import InputError, without_secrets
from posttrain_jax.core.schema import all_values, flat_keys, unknown_key
from posttrain_jax.wiring.key_names import SYNONYMS

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
    """The config as it is written: plain JSON values, without the secrets of URLs that reward functions are given.

    Raises:
      InputError: as `read_experiment`.
    """
    from posttrain_jax.wiring.algorithms import read_experiment

    resolved = json.loads(json.dumps(all_values(read_experiment(config.to_dict()).sections)))
    if "score" in resolved:
        resolved["score"]["arguments"] = _hidden(resolved["score"]["arguments"])
    return resolved


def _hidden(arguments: Any) -> Any:
    """Reward functions' arguments without the secrets of their URLs."""
    return json.loads(without_secrets(json.dumps(arguments)))


def check_allowed(config: ConfigDict, allowed: Sequence[str]) -> None:
    """Whether the keys that --allow_change names are there.

    Raises:
      InputError: one is not; says the nearest.
    """
    known = list(known_leaves(config))
    for key in allowed:
        if key not in known:
            raise InputError(f"--allow_change={key[:80]}: {unknown_key(key, known, SYNONYMS)}")


def changes(config: ConfigDict, workdir: Path, allowed: Sequence[str] = ()) -> list[Change]:
    """The keys that differ from those that the run in a workdir was started with, in order.

    Args:
      config: of this start.
      workdir: the run's folder, with a checkpoint to go on from.
      allowed: keys that may differ besides FREE_KEYS, of those in CHANGEABLE.

    Raises:
      InputError: another key differs; names all that do, with both values, and what to do.
    """
    from posttrain_jax.core.log import log_on_host0
    from posttrain_jax.wiring.saved_config import read_saved

    now = _expanded(flat_keys(resolve(config), known_leaves(config)))
    path = workdir / "config.json"
    if not path.exists():
        log_on_host0(f"{path} is gone; the run goes on with the config of this start.")
        return []
    before = read_saved(path)
    if "score.arguments" in before:  # an older run wrote them with their secrets
        before["score.arguments"] = _hidden(before["score.arguments"])
    before = _expanded(before)
    found = [
        Change(key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
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


def _expanded(flat: Mapping[str, Any]) -> dict[str, Any]:
    """JSON objects by their own keys, so that a change is named as exactly as can be."""
    expanded: dict[str, Any] = {}
    for key, value in flat.items():
        if isinstance(value, dict):
            expanded |= _expanded({f"{key}.{name}": item for name, item in value.items()})
        else:
            expanded[key] = value
    return expanded


def _may_change(change: Change) -> bool:
    return change.key.startswith(CHANGEABLE)


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
