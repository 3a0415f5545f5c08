"""Files that come with the package (configs, chat templates, tiny data), found from any working directory.

They lie in `configs/`, beside `posttrain_jax/`, in a checkout as well as where pip installs.
"""

from __future__ import annotations

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = "configs"


def find_file(name: str) -> pathlib.Path:
    """The path that `name` means: the file or folder of that name; or, where the working directory has none, the
    installed one that a name such as `configs/tiny/chats.jsonl` stands for. May raise what `Path.exists` raises."""
    path = pathlib.Path(name).expanduser()
    installed = ROOT / path
    if path.parts[:1] == (CONFIGS,) and not path.exists() and installed.exists():
        return installed
    return path


def find_config(name: str) -> pathlib.Path:
    """`find_file` of a config, whose name may also start below `configs/`, as `sft/smollm2_135m.py` does."""
    path = find_file(name)
    short = ROOT / CONFIGS / path
    return short if not path.exists() and short.is_file() else path
