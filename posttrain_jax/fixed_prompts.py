"""The prompts that every evaluation of a run answers, so that its change can be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict as Config

from posttrain_jax.experiment import Policy
from posttrain_jax.models.tokenizer import stop_token_ids
from posttrain_jax.sampling.generate import GenerateOptions, generate
from posttrain_jax.trees import combine
from posttrain_jax.types import TrainState


def answer_fixed_prompts(config: Config, policy: Policy) -> Callable[[TrainState], list[dict[str, Any]]]:
    """Greedy answers to `eval.prompts`, each a conversation of one user turn, for `samples.jsonl`."""
    tokenizer = policy.tokenizer
    stops = stop_token_ids(policy.model.config, tokenizer)
    prompts = [
        np.asarray(
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"],
            np.int32,
        )
        for chat in ([{"role": "user", "content": prompt}] for prompt in config.eval.prompts)
    ]

    def sample(state: TrainState) -> list[dict[str, Any]]:
        samples = generate(
            policy.model,
            combine(state.params, state.frozen),
            prompts,
            GenerateOptions(config.eval.max_new_tokens, stop_token_ids=stops, seed=config.seed),
        )
        return [
            {
                "prompt": prompt,
                "answer": tokenizer.decode(sample.tokens, skip_special_tokens=True),
                "finish_reason": sample.finish_reason,
                "tokens": len(sample.tokens),
            }
            for prompt, sample in zip(config.eval.prompts, samples, strict=True)
        ]

    return sample
