"""A random two-layer model with the byte tokenizer, as a Hugging Face folder; and how to run an entry point."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess

import entry_points
import jax

from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import make_model

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=260,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=64,
    max_length=128,
    query_scale=8**-0.5,
)


def save_tiny_model(
    folder: pathlib.Path, *, scale: float = 8.0, chat: bool = True, max_length: int = CONFIG.max_length
) -> pathlib.Path:
    """`scale` sharpens the random logits, so that argmax has no near-ties."""
    config = dataclasses.replace(CONFIG, max_length=max_length)
    params = make_model(config).init(jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"] * scale
    tokenizer = byte_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    export_hf(folder, config=config, params=params, tokenizer=tokenizer)
    return folder


def save_tiny_reward_model(folder: pathlib.Path) -> pathlib.Path:
    """A random one that reads conversations of the byte tokenizer."""
    params = make_model(CONFIG).init(jax.random.key(1))
    params.pop("head", None)
    head = score_head_params(jax.random.key(2), CONFIG.d_model, init="normal")
    export_hf(folder, config=CONFIG, params={**params, "score_head": head}, tokenizer=byte_tokenizer())
    return folder


def launch(
    name: str, *arguments: str, stdin: str | bytes = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m launch.NAME` on one CPU device, with more environment variables."""
    ended = entry_points.run(
        f"launch.{name}", *arguments, stdin=stdin, env=entry_points.environment(**variables)
    )
    return subprocess.CompletedProcess((name, *arguments), ended.code, ended.out, ended.err)
