"""What goes into the engine (requests) and what comes out (updates)."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import GREEDY, Sampling


class Decoder(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str: ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to be generated.

    Attributes:
      tokens: the prompt's ids, 1-D, not empty.
      max_new_tokens: most tokens of the completion, the stop token included.
      min_new_tokens: no stop token before so many.
      stop_token_ids: a completion ends with one of these.
      stop_strings: a completion ends with the token that completes one of these in its text; the text of the first
        `min_new_tokens` does not count.
      sampling: how tokens are drawn.
      seed, prompt, sample: what the random numbers depend on.
    """

    tokens: np.ndarray
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    seed: int = 0
    prompt: int = 0
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class Update:
    """The new tokens of a request since the last `step`.

    Attributes:
      request_id: what `submit` returned.
      tokens, logprobs, sample_logprobs: the new tokens; see `Sample`.
      alternatives: for each new token the likeliest ones as (id, log-probability) pairs, the likeliest first.
      finish_reason: None while there is more to come, else "stop" or "length".
      stop_string: the stop string that ended it, if one did.
      stop_at: the character of the completion's text at which that stop string begins.
    """

    request_id: int
    tokens: np.ndarray
    logprobs: np.ndarray
    sample_logprobs: np.ndarray
    alternatives: list[list[tuple[int, float]]]
    finish_reason: str | None
    stop_string: str | None = None
    stop_at: int | None = None


def check_prompt(model: Model, prompt: np.ndarray, name: str, max_new_tokens: int) -> None:
    """Raises InputError, with the prompt's name, for a prompt that the model cannot complete."""
    config = model.config
    if prompt.ndim != 1 or prompt.size == 0:
        raise InputError(f"{name} has no tokens; a model needs at least one token to go on from.")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise InputError(f"{name} holds {prompt.dtype} values; token ids are whole numbers.")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        wrong = int(prompt[(prompt < 0) | (prompt >= config.vocab_size)][0])
        raise InputError(f"{name} holds the token id {wrong}; the model knows 0 to {config.vocab_size - 1}.")
    if prompt.size > config.max_length - (max_new_tokens > 0):
        raise InputError(
            f"{name} has {prompt.size} tokens, which leaves no room for a completion in the model's context of "
            f"{config.max_length}; shorten it."
        )
