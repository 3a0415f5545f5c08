"""The prompts that every evaluation of a run completes, so that a reader sees how the completions change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import TrainState
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions
from posttrain_jax.models.io.tokenizer import stop_token_ids
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.generate import GenerateOptions, generate
from posttrain_jax.sampling.prompts import encode_chat


def complete_fixed_prompts(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    chat: ChatOptions = DEFAULT_CHAT,
) -> Callable[[TrainState], list[dict[str, Any]]]:
    """Greedy completions of some texts, each a conversation of one user turn, as rows for `samples.jsonl`.

    Raises:
      InputError: there is no chat template, or it refuses a text.
    """
    stops = stop_token_ids(model.config, tokenizer)
    try:
        prompts = [encode_chat(tokenizer, [{"role": "user", "content": text}], chat=chat) for text in texts]
    except InputError as error:
        raise InputError(f"eval.prompts are turns of a chat: {error} Or set eval.prompts to ().") from error

    def sample(state: TrainState) -> list[dict[str, Any]]:
        samples = generate(
            model,
            combine(state.params, state.frozen),
            prompts,
            GenerateOptions(max_new_tokens, stop_token_ids=stops, seed=seed),
        )
        return [
            {
                "prompt": prompt,
                "completion": tokenizer.decode(sample.tokens, skip_special_tokens=True),
                "finish_reason": sample.finish_reason,
                "tokens": len(sample.tokens),
            }
            for prompt, sample in zip(texts, samples, strict=True)
        ]

    return sample
