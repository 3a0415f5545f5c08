"""The section `score` of a config."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import check, setting
from posttrain_jax.rewards.ensemble import KINDS

AGGREGATES = ("sum", "piecewise")
MISSING_EOS = ("keep", "replace", "penalize")


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What scores, and how the parts of a score become one number, in the order of
    `aggregate`, `normalize`, `per_token`, `clip`, `missing_eos`.

    "piecewise" is Llama 2's choice between two reward models, the first for safety, the second for helpfulness
    (`combine.piecewise_safety`; a prompt is one of safety where its row's `is_safety` is true or 1), which is
    whitened over an iteration's completions. A completion without EOS "keep"s its score, has it "replace"d by
    `missing_eos_value` (Ziegler et al., Huang et al.: -1), or is "penalize"d by that much.
    """

    functions: tuple[str, ...] = setting(
        (), 'reward functions, "module:function", each run in worker processes'
    )
    arguments: dict[str, Any] = setting({}, 'of functions: {"module:function": {"argument": value}}')
    completions_per_call: int = setting(1, "completions that a function gets at once", minimum=1)
    models: tuple[str, ...] = setting((), "reward models, MODELs with a score head")
    weights: tuple[float, ...] = setting(
        (), "of the functions, then of the models; () = 1 each", minimum=-math.inf
    )
    aggregate: str = setting("sum", "of the weighted rewards; piecewise: Llama 2's", choices=AGGREGATES)
    safety_threshold: float = setting(0.15, "of piecewise, a probability", above=0, below=1)
    normalize: int = setting(
        0, "gain and bias by this many completions of the policy at the start (Ziegler: 256); 0 = off"
    )
    gold_function: str = setting("", "scores held-out completions as eval/gold; nothing is learned from it")
    gold_model: str = setting("", "the same, by a reward model")
    ensemble: str = setting(
        "mean", "an ensemble's members; uncertainty: mean - coefficient x variance", choices=KINDS
    )
    coefficient: float = setting(0.0, "of uncertainty (arXiv:2310.02743)")
    free_tokens: int = setting(0, "of a completion, not penalized by per_token", unit="tokens")
    per_token: float = setting(
        0.0, "taken off for each token beyond free_tokens; below 0 it is given", minimum=-math.inf
    )
    clip: float = setting(0.0, "the score is brought into [-clip, clip]; 0 = off")
    missing_eos: str = setting("keep", "the score of a completion without EOS", choices=MISSING_EOS)
    missing_eos_value: float = setting(-1.0, "see missing_eos", minimum=-math.inf)
    seconds: float = setting(10.0, "that a function may take for a completion", unit="seconds", above=0)
    failure: float = setting(
        0.0,
        "in evaluations, the score of a completion that a function fails at; training leaves it out",
        minimum=-math.inf,
    )
    workers: int = setting(2, "processes for the functions", minimum=1)

    def __post_init__(self) -> None:
        check(self, "score")
        names = self.names
        if self.weights and len(self.weights) != len(names):
            raise InputError(
                f"score.weights has {len(self.weights)} numbers for {len(names)} rewards (score.functions, then "
                "score.models)."
            )
        if len(set(names)) != len(names):
            raise InputError("score.functions and score.models name a reward twice.")
        if self.aggregate == "piecewise" and self.weights:
            raise InputError(
                "score.weights is set, but score.aggregate=piecewise chooses one of two rewards and adds none."
            )
        if self.aggregate == "piecewise" and len(names) != 2:
            raise InputError(
                "score.aggregate=piecewise chooses between a safety and a helpfulness reward, in this order; there are "
                f"{len(names)}: {', '.join(names) or 'none'}."
            )
        for name, given in self.arguments.items():
            if name not in (*self.functions, self.gold_function):
                raise InputError(
                    f"score.arguments names {name}, which is neither among score.functions nor score.gold_function."
                )
            if not isinstance(given, dict):
                raise InputError(
                    f'score.arguments gives {name} {given!r}; write {{"module:function": {{"argument": value}}}}.'
                )
        if self.free_tokens and not self.per_token:
            raise InputError(
                f"score.free_tokens is {self.free_tokens}, but score.per_token is 0, so length costs nothing."
            )
        if self.ensemble == "uncertainty" and not self.coefficient:
            raise InputError(
                "score.ensemble=uncertainty needs score.coefficient above 0, times the variance."
            )
        if self.ensemble != "uncertainty" and self.coefficient:
            raise InputError(
                f"score.coefficient is {self.coefficient:g}, and score.ensemble={self.ensemble} does not look at it; "
                "leave it 0."
            )
        if self.gold_function and self.gold_model:
            raise InputError(
                "score.gold_function and score.gold_model are both set; the gold score is one of them."
            )

    @property
    def names(self) -> list[str]:
        """Of all rewards, in the order of the weights."""
        return [*self.functions, *self.models]

    @property
    def weight_of(self) -> dict[str, float]:
        """The weight of each reward."""
        return dict(zip(self.names, self.weights or (1.0,) * len(self.names), strict=True))

    @property
    def gold(self) -> ScoreOptions | None:
        """What scores held-out completions and is never learned from, as options of a scorer of its own."""
        if not self.gold_function and not self.gold_model:
            return None
        return ScoreOptions(
            functions=(self.gold_function,) if self.gold_function else (),
            models=(self.gold_model,) if self.gold_model else (),
            arguments={name: given for name, given in self.arguments.items() if name == self.gold_function},
            completions_per_call=self.completions_per_call,
            ensemble=self.ensemble,
            coefficient=self.coefficient,
            seconds=self.seconds,
            failure=self.failure,
            workers=self.workers,
        )
