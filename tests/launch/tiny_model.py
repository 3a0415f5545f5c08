"""A random two-layer model with the byte tokenizer, as a Hugging Face folder; and how to run an entry point."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax

from posttrain_jax.export_model import export_hf
from posttrain_jax.models.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import make_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
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


def environment() -> dict[str, str]:
    """One CPU device, so that a subprocess starts and compiles quickly."""
    flags = " ".join(word for word in os.environ["XLA_FLAGS"].split() if "device_count" not in word)
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(name: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `python -m launch.NAME`."""
    return subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *arguments],
        cwd=ROOT,
        env=environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
