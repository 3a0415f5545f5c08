"""Log-probabilities of given choices after a prompt: for multiple choice, and for a model that judges."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import shard_multiple
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions
from posttrain_jax.data.packing import best_fit, empty_row
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.sampling.prompts import encode_user_prompt, need_tokenizer
from posttrain_jax.sampling.sequence_sums import sequence_sums
from posttrain_jax.sampling.shapes import bucket

ROW_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class EncodedChoices:
    """The tokens of each choice after its prompt, and how many tokens at the start all of them share."""

    tokens: list[np.ndarray]
    shared: int


def encode_choices(
    loaded: LoadedModel,
    prompt: str,
    choices: Sequence[str],
    *,
    chat: bool,
    name: str,
    options: ChatOptions = DEFAULT_CHAT,
) -> EncodedChoices:
    """The tokens of prompt and choice together, for each choice; `name` is what to call the prompt in an error.

    In plain text a space stands between them, unless the prompt ends with white space already, and white space at its
    end belongs to the choice (lm-eval's `_encode_pair`); after a chat template the choice is what the assistant writes,
    encoded on its own, for no token reaches over the end of a turn's header.

    Raises:
      InputError: names the prompt; a prompt and choice longer than the model's context, without a token that all
        choices share to start from, or a choice without a token of its own.
    """
    text = prompt if chat else prompt.rstrip()
    prompt_ids = encode_user_prompt(loaded, text, chat=chat, name=name, options=options)
    if chat:
        tokenizer = need_tokenizer(loaded)
        ends = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in choices]
        sequences = [np.concatenate([prompt_ids, np.asarray(end, np.int32)]) for end in ends]
    else:
        space = "" if prompt[-1:].isspace() else " "
        texts = [prompt + space + text for text in choices]
        sequences = [encode_user_prompt(loaded, text, chat=False, name=name) for text in texts]
    columns = zip(prompt_ids, *sequences, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns))
    if shared == 0:
        raise InputError(f"{name}: the prompt has no token that every choice starts with.")
    for ids, text in zip(sequences, choices, strict=True):
        if len(ids) == shared:
            raise InputError(f"{name}: the choice {text!r} has no token of its own.")
        if len(ids) > loaded.config.max_length:
            raise InputError(
                f"{name} has {len(ids)} tokens with the choice {text!r}, more than the model's context of "
                f"{loaded.config.max_length}; shorten it."
            )
    return EncodedChoices(sequences, shared)


def choice_logps(
    loaded: LoadedModel,
    prompts: Sequence[EncodedChoices],
    *,
    batch_rows: int = 8,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """For each prompt the log-probability (nats) of each choice's own tokens, summed, float64 `[choices]`.

    Sequences are packed into rows, where they do not see each other; `batch_rows` rows at once over all devices.
    `progress` is called with (batches done, batches).

    Raises:
      InputError: a log-probability that is not finite.
    """
    if batch_rows < 1:
        raise InputError(f"eval.batch_rows is {batch_rows}; it must be at least 1.")
    sequences = [(ids, prompt.shared) for prompt in prompts for ids in prompt.tokens]
    lengths = [len(ids) for ids, _ in sequences]
    width = min(bucket(max([*lengths, ROW_TOKENS])), loaded.config.max_length)
    rows = best_fit(lengths, width)
    rows_per_batch = shard_multiple(min(batch_rows, len(rows)), mesh)
    total = -(-len(rows) // rows_per_batch)

    def show(done: int) -> None:
        if progress is not None:
            progress(done, total)

    sums_S4 = sequence_sums(
        loaded.model,
        loaded.params,
        _batches(sequences, rows, width, rows_per_batch),
        mesh=mesh,
        progress=show,
    )
    logps_S = np.zeros(len(sequences))
    logps_S[[index for row in rows for index in row]] = -sums_S4[:, 0]
    if not np.isfinite(logps_S).all():
        raise InputError(
            "A choice's log-probability is not finite; the model's weights or model.dtype cannot be right."
        )
    return np.split(logps_S, np.cumsum([len(prompt.tokens) for prompt in prompts])[:-1])


def _batches(
    sequences: list[tuple[np.ndarray, int]], rows: list[list[int]], width: int, rows_per_batch: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of packed rows, `[rows_per_batch, width]`; the last one is filled up with rows of padding."""
    for first in range(0, len(rows), rows_per_batch):
        filled = [
            _row([sequences[index] for index in row], width) for row in rows[first : first + rows_per_batch]
        ]
        filled += [empty_row(width)] * (rows_per_batch - len(filled))
        yield {key: np.stack([row[key] for row in filled]) for key in filled[0]}


def _row(sequences: list[tuple[np.ndarray, int]], width: int) -> dict[str, np.ndarray]:
    arrays = empty_row(width)
    at = 0
    for segment, (ids, shared) in enumerate(sequences, 1):
        end = at + len(ids)
        arrays["tokens"][at:end] = ids
        arrays["loss_mask"][at + shared : end] = 1
        arrays["segment_ids"][at:end] = segment
        arrays["positions"][at:end] = np.arange(len(ids))
        at = end
    return arrays
