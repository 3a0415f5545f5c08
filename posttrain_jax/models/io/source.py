"""Where a MODEL lies and what it is: a Hugging Face folder or name, a `.gguf` file, a PEFT adapter, or a workdir."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

from huggingface_hub import snapshot_download

from posttrain_jax.core.checkpoint_params import saved_parameters
from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.core.workdir import is_workdir
from posttrain_jax.demo.assets import fetch
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.gguf import config_from_gguf
from posttrain_jax.models.io.gguf_file import GgufFile
from posttrain_jax.models.io.hf_config import config_from_hf, is_reward_config, read_json
from posttrain_jax.models.io.tokenizer import TOKENIZER_FILES

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_HUB_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a MODEL lies, and what kind it is.

    Attributes:
      name: the MODEL as it was given.
      kind: "hf" (a folder), "gguf" (a file), "adapter" (a PEFT folder) or "workdir".
      path: the folder or file.
      step: which checkpoint of a workdir; None = the newest (of a loaded model, the one that was read).
      weights: of a workdir that was loaded, "raw" (the last) or "ema" (their moving average).
    """

    name: str
    kind: str
    path: pathlib.Path
    step: int | None = None
    weights: str = ""

    @property
    def model_folder(self) -> pathlib.Path:
        """Where config.json and the tokenizer lie: a workdir keeps them in `model/`."""
        return self.path / "model" if self.kind == "workdir" else self.path


def resolve(model: str) -> Source:
    """Finds a MODEL. A name on the Hugging Face Hub is downloaded (safetensors, JSON and tokenizer files only);
    `asset:NAME` is one of `posttrain_jax.demo.assets`, fetched if it is not there yet.

    Raises:
      InputError: there is no such thing, or the Hub cannot be reached.
    """
    name = str(model)
    if name.startswith("asset:"):
        return dataclasses.replace(resolve(str(fetch(name.removeprefix("asset:")))), name=name)
    path, step = pathlib.Path(name).expanduser(), None
    at = re.fullmatch(r"(.+)@(\d+)", name)
    if at and not path.exists():
        path, step = pathlib.Path(at[1]).expanduser(), int(at[2])
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"{name}: a model file must be a .gguf; for safetensors give the folder it lies in."
            )
        return Source(name, "gguf", path)
    if path.is_dir():
        if is_workdir(path):
            return Source(name, "workdir", path, step)
        if step is not None:
            raise InputError(
                f"{name}: {path} is not a workdir (it has no checkpoints/), so @{step} means nothing."
            )
        return _folder(name, path)
    if step is not None or not _HUB_NAME.fullmatch(name) or name.endswith(".gguf"):
        raise InputError(
            f"{name}: there is no such file or folder; give a Hugging Face folder or name, a .gguf file, or a workdir."
        )
    return _folder(name, _download(name))


def _folder(name: str, path: pathlib.Path) -> Source:
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if "model_type" not in config and "algorithm" in config:
            raise InputError(
                f"{name}: the run in this workdir has no checkpoint yet, so there is no model to load."
            )
        return Source(name, "hf", path)
    if (path / "adapter_config.json").is_file():
        return Source(name, "adapter", path)
    raise InputError(
        f"{name}: the folder has no config.json, adapter_config.json or checkpoints/, so it is no model."
    )


def _download(name: str) -> pathlib.Path:
    patterns = [*_HUB_FILES, *TOKENIZER_FILES, "*.jinja"]
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub, its HTTP client and the socket layer each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: there is no such folder here, and the Hugging Face Hub did not give it ({reason}); "
            "check the name and the network, or give the path of a folder that you have."
        ) from error


def load_config(source: Source) -> ModelConfig:
    """The configuration, without reading weights."""
    if source.kind == "gguf":
        return config_from_gguf(GgufFile(source.path))
    if source.kind == "adapter":
        return load_config(base_of(source))
    return config_from_hf(source.model_folder)


def is_reward_model(source: Source) -> bool:
    """Whether a MODEL's own config says that it has a score head, without reading weights."""
    if source.kind == "adapter":
        return is_reward_model(base_of(source))
    return source.kind != "gguf" and is_reward_config(read_json(source.model_folder / "config.json"))


def member_count(source: Source) -> int:
    """How many reward models the ensemble in a workdir has; 0 where there is no ensemble."""
    if source.kind != "workdir":
        return 0
    kernel = saved_parameters(source.path, step=source.step).get("members/score_head/kernel")
    return kernel[0] if kernel else 0


def workdir_lora(workdir: pathlib.Path) -> LoraConfig:
    """The adapter that the run in this workdir trains."""
    fields = _run_model(workdir).get("lora") or {"rank": 0}
    try:
        if not fields["rank"]:
            return LoraConfig()
        targets = tuple(str(name) for name in fields["targets"])
        return LoraConfig(int(fields["rank"]), float(fields["alpha"]), targets, bool(fields["rslora"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{workdir / 'config.json'}: model.lora is {shown(fields)}, which no run writes there; restore the file."
        ) from error


def evaluates_average(workdir: pathlib.Path) -> bool:
    """Whether the run in this workdir evaluates the moving average of its weights."""
    section = read_json(workdir / "config.json").get("eval", {})
    return isinstance(section, dict) and section.get("weights") == "ema"


def _run_model(workdir: pathlib.Path) -> dict[str, Any]:
    """The section `model` of a run's config."""
    section = read_json(workdir / "config.json").get("model", {})
    if not isinstance(section, dict):
        raise InputError(
            f"{workdir / 'config.json'}: model is {shown(section)}, which no run writes there; restore the file."
        )
    return section


def has_adapter(source: Source) -> bool:
    """Whether a model comes with a LoRA adapter that was trained."""
    return source.kind == "adapter" or (source.kind == "workdir" and workdir_lora(source.path).rank > 0)


def base_name(source: Source) -> str:
    """The MODEL without an adapter that a model's adapter was trained on; "" where nothing names it.

    A run can continue the adapter of another run or folder; those on this machine are followed back to the first.
    """
    seen = set()
    while True:
        if source.kind == "workdir":
            name = str(_run_model(source.path).get("init") or "")
        else:
            name = _named_base(source)
        if not name or not pathlib.Path(re.sub(r"@\d+$", "", name)).expanduser().is_dir():
            return name
        source = resolve(name)
        if not has_adapter(source):
            return name
        if source.path.resolve() in seen:
            raise InputError(
                f"{source.path}: its base model leads back to itself; write the right one there."
            )
        seen.add(source.path.resolve())


def base_path(source: Source) -> str:
    """`base_name` for other programs: the absolute path of a base on this machine, also of an asset's file; a Hub name
    as it is; "" where nothing names the base, or it was drawn at random."""
    name = base_name(source)
    if name in ("", "random"):
        return ""
    if name.startswith("asset:"):
        return str(resolve(name).path.resolve())
    folder = re.sub(r"@\d+$", "", name)
    path = pathlib.Path(folder).expanduser()
    return f"{path.resolve()}{name[len(folder) :]}" if path.exists() else name


def _named_base(source: Source) -> str:
    """The base model that adapter_config.json names; "" where it names none."""
    base = read_json(source.path / "adapter_config.json").get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise InputError(
            f"{source.path}: base_model_name_or_path of adapter_config.json is {shown(base)}, but must be a string."
        )
    return base


def base_of(source: Source) -> Source:
    """The base model of a PEFT adapter.

    Raises:
      InputError: adapter_config.json names none, or another adapter.
    """
    name = _named_base(source)
    if not name:
        raise InputError(
            f"{source.path}: adapter_config.json names no base_model_name_or_path; write it there."
        )
    base = resolve(name)
    if base.kind == "adapter":
        itself = base.path.resolve() == source.path.resolve()
        raise InputError(
            f"{source.name}: its base_model_name_or_path is {name}, "
            f"{'the adapter itself' if itself else 'an adapter too'}; "
            f"{'write the base model there' if itself else 'merge that into its base model first'}."
        )
    return base
