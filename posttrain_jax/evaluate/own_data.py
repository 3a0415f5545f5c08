"""What a run held out: the data that an evaluation of its workdir means where nobody names others."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from posttrain_jax.algorithms.contract import OnlineAlgorithm, PreferenceAlgorithm
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import read
from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.data.options import PreferenceDataOptions, TextDataOptions
from posttrain_jax.data.prompts import read_prompts
from posttrain_jax.data.rows import ColumnNames
from posttrain_jax.data.split import hold_out, split_amount
from posttrain_jax.data.tokenized import TokenizeOptions, build
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.rollouts.sampling import encode_prompt
from posttrain_jax.sampling.prompts import need_tokenizer
from posttrain_jax.wiring.algorithms import algorithm_named
from posttrain_jax.wiring.data import data_spec, kept_date, tokenize_options
from posttrain_jax.wiring.saved_config import read_run


@dataclasses.dataclass(frozen=True)
class HeldOutData:
    """Data, which part of them ("split:60"; "" = all of them), and the seed that draws it."""

    data: Any
    part: str
    seed: int

    def text(self) -> str:
        """What it is, in words."""
        return f"{self.data}, held out by {self.part} with seed {self.seed}" if self.part else f"{self.data}"


@dataclasses.dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt of a run's held-out rows, as the run asks it: its "file:line", its tokens, and what they say."""

    key: str
    tokens: np.ndarray
    text: str


def run_config(loaded: LoadedModel) -> dict[str, Any] | None:
    """The config of the run in a workdir; None for any other MODEL."""
    return read_run(loaded.source.path) if loaded.source.kind == "workdir" else None


def run_chat(loaded: LoadedModel, run: dict[str, Any]) -> ChatOptions:
    """How the rows of a workdir's run become text; the run's chat template is its tokenizer's by now."""
    return ChatOptions(
        variables=run["data"]["chat_template_kwargs"],
        now=kept_date(loaded.source.path),
        text_as=run["data"]["text_as"],
    )


def run_rules(loaded: LoadedModel, run: dict[str, Any]) -> TokenizeOptions:
    """How the rows of a workdir's run become sequences."""
    rules: TextDataOptions | PreferenceDataOptions
    if isinstance(algorithm_named(run["algorithm"]), PreferenceAlgorithm):
        rules = read(PreferenceDataOptions, run["data"], "data")
    else:
        rules = read(TextDataOptions, run["data"], "data")
    return tokenize_options(rules, run_chat(loaded, run))


def held_out_by(run: dict[str, Any], name: str) -> HeldOutData:
    """What a run held out.

    Args:
      run: its config.
      name: its workdir, for the error.

    Raises:
      InputError: nothing.
    """
    held_out = run["data"]["eval"]
    if not held_out:
        raise InputError(
            f"The run in {name} held nothing out (its data.eval is empty), so it has no rows of its own; say what to "
            "evaluate on."
        )
    if split_amount(held_out) is None:
        return HeldOutData(held_out, "", run["seed"])
    return HeldOutData(run["data"]["train"], held_out, run["seed"])


def held_out_prompts(run: dict[str, Any], loaded: LoadedModel, source: HeldOutData) -> list[HeldOutPrompt]:
    """The prompts of what a run held out, encoded as the run encodes them. Of a row that is trained on a prompt is what
    stands before the first trained token; rows that have nothing there are left out.

    Raises:
      InputError: the data cannot be read.
    """
    tokenizer = need_tokenizer(loaded)
    spec = data_spec(source.data)
    algorithm = algorithm_named(run["algorithm"])
    data: Any
    if isinstance(algorithm, OnlineAlgorithm):
        encode = functools.partial(
            encode_prompt,
            tokenizer=tokenizer,
            vocab_size=loaded.config.vocab_size,
            text_tokens=run["data"]["prompt_tokens"],
            chat=run_chat(loaded, run),
        )
        data = read_prompts(
            spec,
            encode,
            max_tokens=run["data"]["max_length"] - run["rollout"]["max_new_tokens"],
            long_prompts=run["data"]["long_prompts"],
            on_bad_row=run["data"]["on_bad_row"],
            columns=ColumnNames(run["data"]["columns"], run["data"]["ignore_columns"]),
        )
    else:
        build_data = build_preferences if isinstance(algorithm, PreferenceAlgorithm) else build
        data = build_data(spec, tokenizer, run_rules(loaded, run))
    amount = split_amount(source.part)
    if amount is not None:
        data = hold_out(data, amount, seed=source.seed)[1]
    prompts: dict[str, np.ndarray] = {}
    for part in data.sources:
        for i in range(len(part)):
            if isinstance(algorithm, OnlineAlgorithm):
                tokens = part.prompts[i].tokens
            else:
                on_preferences = isinstance(algorithm, PreferenceAlgorithm)
                first = part.group(i).sequences[0] if on_preferences else part.sequence(i)
                tokens = np.asarray(first.tokens[: int(np.argmax(first.loss_mask))], np.int32)
            if tokens.size:
                prompts.setdefault(part.row_id(i), tokens)  # a row may make several groups
    return [HeldOutPrompt(key, tokens, tokenizer.decode(tokens)) for key, tokens in prompts.items()]
