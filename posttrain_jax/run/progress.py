"""The progress line: how far a run is, how it goes, and how long it still takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain_jax.core.types import ProgressField

RATES = (
    ProgressField("lr {:.2e}", ("train/lr",)),
    ProgressField("grad norm {:.2f}", ("train/grad_norm",)),
    ProgressField("{:,.0f} tokens/s", ("train/tokens_per_second",)),
    ProgressField("padding {:.1%}", ("train/padding_share",)),
    ProgressField("MFU {:.1%}", ("train/mfu",)),
)
"""What an algorithm that learns from rows shows after its own fields."""

ROLLOUTS = (
    ProgressField("score {:.3f} ± {:.3f}", ("train/score", "train/score_std")),
    ProgressField("KL {:.3f}", ("train/kl_per_sequence",)),
    ProgressField("entropy {:.2f}", ("train/entropy_per_token",)),
    ProgressField("{:.0f} tokens each", ("train/completion_tokens",)),
    ProgressField("no EOS {:.0%}", ("train/no_eos_share",)),
    ProgressField("generate {:.1f} s", ("train/seconds_generate",)),
    ProgressField("learn {:.1f} s", ("train/seconds_train",)),
)
"""What an algorithm that learns from its own completions shows: mean and spread of the scores, KL to the reference
(nats per completion), entropy (nats per token), length, the share without an EOS token, and the time of each half."""


def progress_line(
    step: int, steps: int, fields: Sequence[ProgressField], values: Mapping[str, float], eta_seconds: float
) -> str:
    """One line for a person.

    Args:
      step, steps: taken so far, and in the whole run.
      fields: what the algorithm shows.
      values: what was just logged.
      eta_seconds: the time that is left, estimated.
    """
    hours, rest = divmod(int(max(eta_seconds, 0)), 3600)
    parts = [f"step {step}/{steps}"]
    for field in fields:
        numbers = [values[name] for name in field.metrics if name in values]
        if len(numbers) == len(field.metrics):
            parts.append(field.text.format(*numbers))
    if values.get("train/skipped"):
        parts.append(f"skipped {values['train/skipped']:.0f}")
    parts.append(f"ETA {hours:d}:{rest // 60:02d}:{rest % 60:02d}")
    return "  ".join(parts)
