"""When a run that learns from its own completions should end before its last step, read from what is logged anyway."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from posttrain_jax.core.schema import check, setting


@dataclasses.dataclass(frozen=True)
class StopRules:
    """The section `stop` of a config: limits, checked wherever it is logged; 0 = off."""

    kl: float = setting(
        0.0,
        "train/kl_per_sequence above this: beyond some KL the score is gained by what it does not measure "
        "(arXiv:2210.10760)",
        unit="nats",
    )
    entropy: float = setting(
        0.0, "train/entropy_per_token below this: the policy has come down to a few completions", unit="nats"
    )
    repetition: float = setting(
        0.0, "train/repeated_4gram_share above this: completions repeat themselves", maximum=1
    )
    gold_errors: float = setting(
        0.0,
        "eval/gold below its best by so many of its standard errors: the score that is learned from still rises, what "
        "it stands for falls",
    )

    def __post_init__(self) -> None:
        check(self, "stop")

    def reason(self, values: Mapping[str, float], best: Mapping[str, float]) -> str:
        """Why to end here, in a clause; "" = go on.

        Args:
          values: what was just logged; a name that is not there is not checked.
          best: the highest value so far of each metric of an evaluation, this one included.
        """
        kl, entropy = values.get("train/kl_per_sequence"), values.get("train/entropy_per_token")
        repetition, gold = values.get("train/repeated_4gram_share"), values.get("eval/gold")
        if self.kl and kl is not None and kl > self.kl:
            return f"train/kl_per_sequence is {kl:.4g}, above stop.kl={self.kl:g}"
        if self.entropy and entropy is not None and entropy < self.entropy:
            return f"train/entropy_per_token is {entropy:.4g}, below stop.entropy={self.entropy:g}"
        if self.repetition and repetition is not None and repetition > self.repetition:
            return (
                f"train/repeated_4gram_share is {repetition:.4g}, above stop.repetition={self.repetition:g}"
            )
        if self.gold_errors and gold is not None:
            lowest = best["eval/gold"] - self.gold_errors * values["eval/gold_standard_error"]
            if gold < lowest:
                return (
                    f"eval/gold is {gold:.4g}, more than stop.gold_errors={self.gold_errors:g} standard errors below "
                    f"its best, {best['eval/gold']:.4g}"
                )
        return ""
