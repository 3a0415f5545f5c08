"""A reward model as the judge: it scores both completions, and the higher score is preferred.

Nothing is asked twice, for a score does not know of an order. Several members of an ensemble are combined as in
`launch.reward_report`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import shard_multiple
from posttrain_jax.data.preference_rows import row_shape
from posttrain_jax.data.tokenized import TokenizeOptions
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.rewards.ensemble import Ensemble, member_scores
from posttrain_jax.rewards.judge import Judged, Judgment, Pair, Usage, preferences_of_scores


def judge_by_reward(
    members: Sequence[LoadedModel],
    pairs: Sequence[Pair],
    rows: Path,
    mesh: Mesh,
    *,
    ensemble: Ensemble,
    batch_rows: int,
) -> Judged:
    """Judges every pair by the scores of its two completions, which are the replies. An empty completion has no score,
    and is worse than any other.

    Args:
      members: of an ensemble, or a single reward model.
      pairs: about what.
      rows: JSON Lines of the completions are written here, A's and B's in turn, and named in errors.
      mesh: where the members' parameters are.
      ensemble: how the members' scores become one.
      batch_rows: completions at once; rounded up to the devices that split rows.

    Raises:
      InputError: the model has no tokenizer or no template for these prompts; a completion is too long.
    """
    first = members[0]
    if first.tokenizer is None:
        raise InputError(f"{first.source.name} has no tokenizer, so it cannot read the completions.")
    completions = [(pair.prompt_row, text) for pair in pairs for text in (pair.a, pair.b)]
    scores = np.full(len(completions), -np.inf)
    written = [place for place, (_, text) in enumerate(completions) if text.strip()]
    read = 0
    if written:
        scores[written], read = _scores(
            members, [completions[place] for place in written], rows, mesh, ensemble, batch_rows
        )
    # Where they stand in a row changes the last bits of two equal completions' scores, and must not decide.
    equal = [pair.a == pair.b for pair in pairs]
    preferences = np.where(equal, 0.5, preferences_of_scores(scores[::2], scores[1::2]))
    judgments = [
        Judgment(pair.prompt, preference, preference, len(pair.a), len(pair.b), pair.sample)
        for pair, preference in zip(pairs, preferences.tolist(), strict=True)
    ]
    replies = ["empty" if score == -np.inf else f"{score:.6g}" for score in scores.tolist()]
    return Judged(
        judgments, list(zip(replies[::2], replies[1::2], strict=True)), Usage(len(written), 0, read, 0)
    )


def _scores(
    members: Sequence[LoadedModel],
    completions: Sequence[tuple[str | list[dict[str, Any]], str]],
    rows: Path,
    mesh: Mesh,
    ensemble: Ensemble,
    batch_rows: int,
) -> tuple[np.ndarray, int]:
    """The score of every (prompt, completion), and how many tokens were read."""
    first = members[0]
    assert first.tokenizer is not None  # checked by judge_by_reward
    rows.write_text(
        "".join(
            json.dumps({"prompt": prompt, "completion": text, "rating": 0}) + "\n"
            for prompt, text in completions
        ),
        "utf-8",
    )
    options = TokenizeOptions(max_length=first.config.max_length, truncate="error")
    data = build_preferences(str(rows), first.tokenizer, options)
    (source,) = data.sources
    groups = shard_multiple(batch_rows, mesh)
    shape = row_shape([data], groups=groups, share_prompt=False)
    scores_SE = member_scores(members, source, shape, mesh, groups=groups)
    scores_N = ensemble(scores_SE)[[source.group(i).first_sequence for i in range(len(source))]]
    if len(scores_N) != len(completions):
        raise InputError(f"{rows}: only {len(scores_N)} of {len(completions)} completions could be scored.")
    return scores_N, int(source.store.offsets[-1])
