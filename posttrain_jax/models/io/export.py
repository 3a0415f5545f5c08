"""Exports a model: a Hugging Face folder that `transformers` loads with equal logits.

A model with a `score_head` becomes a `...ForSequenceClassification` with one label. The head of transformers has no
bias, and no weight of the model could take one (the output of the last norm has no constant direction), so a bias is
written into config.json as `score_bias`, and `load_model` reads it there: our score = transformers' + `score_bias`.
Its chat template ends where the score is read, see `scoring_template.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.types import PyTree
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.hf_config import reward_config
from posttrain_jax.models.io.hf_config_out import config_to_hf
from posttrain_jax.models.io.hf_weights import save_safetensors
from posttrain_jax.models.io.peft import merge_error, merge_lora
from posttrain_jax.models.io.scoring_template import for_scoring
from posttrain_jax.models.io.tokenizer import save_tokenizer, scoring_pad_id, stop_token_ids
from posttrain_jax.models.reward_head import fold_gain


def export_hf(
    folder: str | pathlib.Path,
    *,
    config: ModelConfig,
    params: PyTree,
    tokenizer: PreTrainedTokenizerFast | None,
    lora: LoraConfig | None = None,
    original: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Writes weights, config, tokenizer, chat template and generation config as a Hugging Face folder.

    Everything is written beside `folder` and renamed at the end: a killed export leaves no half-made folder.

    Args:
      params: with a `score_head`, a reward model is written; its `head` is left out, if there is one.
      lora: the adapter in `params`, which is merged; None = there is none.
      original, generation: the config.json and generation_config.json that the model came with; their other fields
        are kept.
      dtype: "float32" or "bfloat16"; None keeps the parameters' own.
      overwrite: replace a folder that is there already.

    Raises:
      InputError: the folder is there already, or cannot be written; a reward model without a padding token.
    """
    folder = pathlib.Path(folder).expanduser()
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; remove it or give another folder.")
    stored = dtype or str(jax.tree.leaves(params)[0].dtype)
    if lora is not None and lora.rank:
        _warn_of_lost_adapter(merge_error(params, lora, stored), stored)
        params = merge_lora(params, lora)
    reward, bias = "score_head" in params, 0.0
    if reward:
        kernel, bias = fold_gain(params["score_head"])
        params = {name: part for name, part in params.items() if name != "head"}
        params["score_head"] = {"kernel": kernel}
        config = reward_config(config)
        tokenizer = None if tokenizer is None else for_scoring(tokenizer)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            made = pathlib.Path(scratch) / "model"
            write_model_folder(
                made,
                config=config,
                tokenizer=tokenizer,
                original=original,
                generation=generation,
                dtype=stored,
                reward=reward,
                score_bias=bias,
            )
            save_safetensors(params, config, made, max_shard_bytes, jnp.dtype(stored))
            put_in_place(made, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder}: the export cannot be written ({error}); what was there before is still there."
        ) from error


def _warn_of_lost_adapter(error: float, dtype: str) -> None:
    """Warns where merging a small adapter into weights of few digits rounds it away."""
    if error > 0.05:
        logging.getLogger(__name__).warning(
            "Merged into %s, what the adapter changes is off by %.3g %% (measured on these weights, relative to the "
            "change): export it as float32, or the adapter alone (--adapter_only).",
            dtype,
            100 * error,
        )


def put_in_place(made: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames `made` to `folder`; an old `folder` is moved beside `made`, and moved back if that fails."""
    replaced = made.with_name("replaced")
    if folder.exists():
        os.replace(folder, replaced)
    try:
        os.replace(made, folder)
    except OSError:
        if replaced.exists():
            os.replace(replaced, folder)
        raise


def write_model_folder(
    folder: str | pathlib.Path,
    *,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    original: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    dtype: str = "float32",
    reward: bool = False,
    score_bias: float = 0.0,
) -> None:
    """Everything of a Hugging Face folder but the weights (a workdir keeps this in `model/`).

    Args:
      dtype: the weights' type, as config.json names it.
      reward: a reward model. Its padding token is never the one that ends a text (`tokenizer.scoring_pad_id`), in
        config.json and in the tokenizer.
      score_bias: of a reward model, see above; a workdir has it in its checkpoint instead.

    Raises:
      InputError: a reward model without a padding token.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if reward:
        pad = scoring_pad_id(config, tokenizer)
        config = dataclasses.replace(config, pad_token_id=pad)
        if tokenizer is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    fields = config_to_hf(config, original, reward=reward, score_bias=score_bias)
    _write_json(folder / "config.json", {**fields, "torch_dtype": dtype})
    stops = stop_token_ids(config, tokenizer)
    ids: dict[str, Any] = {"eos_token_id": stops[0] if len(stops) == 1 else list(stops)} if stops else {}
    if config.bos_token_id is not None:
        ids["bos_token_id"] = config.bos_token_id
    if config.pad_token_id is not None:
        ids["pad_token_id"] = config.pad_token_id
    kept = {key: value for key, value in (generation or {}).items() if key != "transformers_version"}
    _write_json(folder / "generation_config.json", {**kept, **ids})
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
