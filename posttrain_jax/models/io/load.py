"""MODEL, wherever it comes from: a Hugging Face folder or name, a `.gguf` file, a PEFT adapter, or a workdir of ours.

`resolve` says what a MODEL is without reading weights; `load_model` loads it. `export_model` is the way back.

A Hugging Face `...ForSequenceClassification` with one label, and the workdir of a reward model, are reward models:
their parameters hold a `score_head` (see `models/reward_head.py`) and no vocabulary projection. `require_score_head`
and `require_language_model` refuse the one kind where the other is needed. An ensemble of reward models lies in one
workdir; `load_members` gives its models one by one.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from huggingface_hub import snapshot_download
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from posttrain_jax.core.checkpoint_params import restore_params, saved_parameters
from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.core.sharding import tree_shardings
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import Array, ModelOutput, PyTree
from posttrain_jax.core.workdir import is_workdir
from posttrain_jax.demo.assets import fetch
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.gguf import config_from_gguf, load_gguf
from posttrain_jax.models.io.gguf_file import GgufFile
from posttrain_jax.models.io.hf_config import config_from_hf, is_reward_config, read_json
from posttrain_jax.models.io.hf_weights import load_safetensors
from posttrain_jax.models.io.peft import load_adapter
from posttrain_jax.models.io.tokenizer import TOKENIZER_FILES, load_tokenizer
from posttrain_jax.models.reward_head import abstract_score_head
from posttrain_jax.models.transformer import Model, make_model

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
    """What a MODEL turned out to be.

    Attributes:
      name: the MODEL as it was given.
      kind: "hf" (a folder), "gguf" (a file), "adapter" (a PEFT folder) or "workdir".
      path: the folder or file.
      step: which checkpoint of a workdir; None = the newest (a loaded model names the one it was).
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


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to use.

    Attributes:
      config: what it is made of.
      params: its parameters (adapter leaves included, where it has an adapter; a `score_head`, where it is a reward
        model).
      tokenizer: None where the source has none.
      model: the transformer, as functions of the parameters.
      source: where it came from.
      original: the config.json that it came with, or None (GGUF).
      generation: the generation_config.json that it came with, or {}.
    """

    config: ModelConfig
    params: PyTree
    tokenizer: PreTrainedTokenizerFast | None
    model: Model
    source: Source
    original: dict[str, Any] | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def lora(self) -> LoraConfig:
        """The adapter's configuration; rank 0 where there is none."""
        return self.model.lora

    def apply(
        self,
        params: PyTree,
        tokens_BT: Array,
        *,
        segment_ids_BT: Array | None = None,
        positions_BT: Array | None = None,
    ) -> ModelOutput:
        """Runs the model; `logits_BTV` are whole, `[B, T, V]` float32 (for notebooks and parity), or None for a
        reward model, whose scores `reward_head.scores` reads off `hidden_BTD`."""
        return self.model.apply(
            params,
            jnp.asarray(tokens_BT),
            segment_ids_BT=segment_ids_BT,
            positions_BT=positions_BT,
            logits="score_head" not in params,
        )


def resolve(model: str) -> Source:
    """What MODEL is. A name on the Hugging Face Hub is downloaded (safetensors, JSON and tokenizer files only);
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
        return load_config(_base_of(source))
    return config_from_hf(source.model_folder)


def is_reward_model(source: Source) -> bool:
    """Whether a MODEL says of itself that it has a score head, without reading weights."""
    if source.kind == "adapter":
        return is_reward_model(_base_of(source))
    return source.kind != "gguf" and is_reward_config(read_json(source.model_folder / "config.json"))


def require_score_head(loaded: LoadedModel) -> PyTree:
    """The head's parameters, of a reward model.

    Raises:
      InputError: it is a language model.
    """
    if "score_head" not in loaded.params:
        raise InputError(
            f"{loaded.source.name} has no score head, so it is a language model and no reward model; give the workdir "
            "of a reward model's run, or a Hugging Face ...ForSequenceClassification folder."
        )
    return loaded.params["score_head"]


def require_language_model(loaded: LoadedModel) -> None:
    """Refuses a reward model where tokens are to be written.

    Raises:
      InputError: it is one.
    """
    if "score_head" in loaded.params:
        raise InputError(
            f"{loaded.source.name} is a reward model: it gives scores and cannot write; give a language model."
        )


def load_model(
    model: str | Source,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    mesh: Mesh | None = None,
    attention: str = "auto",
    ema: bool | None = None,
) -> LoadedModel:
    """Loads a MODEL.

    Args:
      model: a MODEL, or what `resolve` made of it.
      dtype: compute dtype, "float32" or "bfloat16".
      param_dtype: what the parameters are stored as.
      mesh: the parameters are sharded on it as training shards them; None = whole on the default device.
      attention: see `make_model`.
      ema: of a workdir, the moving average of the weights (True) or the last ones; None = those that its run's own
        evaluations look at (`eval.weights`).

    Raises:
      InputError: anything wrong with the model, said in one sentence; an ensemble, for which there is `load_members`.
    """
    source = model if isinstance(model, Source) else resolve(model)
    if ema and source.kind != "workdir":
        raise InputError(f"{source.name} is no workdir, so it has no moving average of its weights.")
    if ema is None:
        ema = source.kind == "workdir" and _evaluates_average(source.path)
    if source.kind == "adapter":
        return _load_adapter(source, dtype=dtype, param_dtype=param_dtype, mesh=mesh, attention=attention)
    count = member_count(source)
    if count:
        raise InputError(
            f"{source.name} holds an ensemble of {count} reward models, and one model is wanted here; export one with "
            f"python -m launch.export --workdir={source.name} --member=0 (to {count - 1}) --out=FOLDER."
        )
    config = load_config(source)
    lora = _workdir_lora(source.path) if source.kind == "workdir" else LoraConfig()
    definition = make_model(config, dtype=dtype, attention=attention, lora=lora)
    reward = is_reward_model(source)
    abstract = definition.abstract_params()
    if reward:
        abstract["score_head"] = abstract_score_head(config.d_model)
    if source.kind == "workdir":
        abstract |= _kept_head(source, reward)
    shardings = None if mesh is None else tree_shardings(abstract, mesh)
    if source.kind == "gguf":
        _, params = load_gguf(source.path, shardings, dtype=param_dtype)
    elif source.kind == "hf":
        params = load_safetensors(source.path, config, shardings, param_dtype, reward=reward)
    else:
        wanted = {
            name: part if name == "score_head" else _stored_as(part, param_dtype)
            for name, part in abstract.items()
        }
        params, step = restore_params(source.path, wanted, step=source.step, shardings=shardings, ema=ema)
        source = dataclasses.replace(source, step=step, weights="ema" if ema else "raw")
        if reward:
            params.pop("head", None)
    tokenizer = load_tokenizer(source.path if source.kind == "gguf" else source.model_folder)
    if source.kind == "gguf":
        return LoadedModel(config, params, tokenizer, definition, source)
    original, generation = _descriptions(source.model_folder)
    return LoadedModel(config, params, tokenizer, definition, source, original, generation)


def member_count(source: Source) -> int:
    """How many reward models the ensemble in a workdir has; 0 for everything that is no ensemble."""
    if source.kind != "workdir":
        return 0
    kernel = saved_parameters(source.path, step=source.step).get("members/score_head/kernel")
    return kernel[0] if kernel else 0


def load_members(
    model: str | Source,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    mesh: Mesh | None = None,
    attention: str = "auto",
    ema: bool | None = None,
) -> list[LoadedModel]:
    """Loads the reward models of an ensemble, or a list of the one that any other reward model is.

    What the members share (the trunk, where they are LoRA adapters) lies in memory once. Arguments are those of
    `load_model`.

    Raises:
      InputError: anything wrong with the model, said in one sentence; a language model.
    """
    source = model if isinstance(model, Source) else resolve(model)
    count = member_count(source)
    if not count:
        single = load_model(
            source, dtype=dtype, param_dtype=param_dtype, mesh=mesh, attention=attention, ema=ema
        )
        require_score_head(single)
        return [single]
    if ema is None:
        ema = _evaluates_average(source.path)
    config = load_config(source)
    definition = make_model(config, dtype=dtype, attention=attention, lora=_workdir_lora(source.path))
    saved = saved_parameters(source.path, step=source.step)
    body = {name: part for name, part in definition.abstract_params().items() if name != "head"}
    own, shared = partition(
        {**_stored_as(body, param_dtype), "score_head": abstract_score_head(config.d_model)},
        lambda path: f"members/{path}" in saved,
    )
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), own)
    wanted = {**shared, "members": stacked}
    params, step = restore_params(
        source.path,
        wanted,
        step=source.step,
        shardings=None if mesh is None else tree_shardings(wanted, mesh),
        ema=ema,
    )
    members = params.pop("members")
    source = dataclasses.replace(source, step=step, weights="ema" if ema else "raw")
    tokenizer = load_tokenizer(source.model_folder)
    original, generation = _descriptions(source.model_folder)
    loaded = []
    for number in range(count):
        part = jax.tree.map(lambda leaf, n=number: leaf[n], members)
        if mesh is not None:
            part = jax.device_put(part, tree_shardings(part, mesh))
        loaded.append(
            LoadedModel(config, combine(part, params), tokenizer, definition, source, original, generation)
        )
    return loaded


def _descriptions(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json and generation_config.json say; {} for the second where there is none."""
    generation = folder / "generation_config.json"
    return read_json(folder / "config.json"), read_json(generation) if generation.is_file() else {}


def _stored_as(tree: PyTree, dtype: str) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def _kept_head(source: Source, reward: bool) -> PyTree:
    """The vocabulary projection that the checkpoints of a reward model may hold all the same, as shapes, or {}.

    Raises:
      InputError: a workdir's description and its checkpoints do not agree on what the model is.
    """
    saved = saved_parameters(source.path, step=source.step)
    if saved and ("score_head/kernel" in saved) != reward:
        raise InputError(
            f"{source.path}: the checkpoints {'lack a' if reward else 'hold a'} score head but model/config.json "
            f"says that this is a {'reward' if reward else 'language'} model; they are not of one run."
        )
    if not reward or "head/kernel" not in saved:
        return {}
    return {"head": {"kernel": jax.ShapeDtypeStruct(saved["head/kernel"], jnp.float32)}}


def _workdir_lora(workdir: pathlib.Path) -> LoraConfig:
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


def _evaluates_average(workdir: pathlib.Path) -> bool:
    """Whether the evaluations of the run in this workdir look at the moving average of the weights."""
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
    return source.kind == "adapter" or (source.kind == "workdir" and _workdir_lora(source.path).rank > 0)


def base_name(source: Source) -> str:
    """The MODEL without an adapter on which a model's adapter was trained; "" where nothing says it.

    A run can go on with the adapter of another run or folder, so those on this machine are followed to the first.
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


def _named_base(source: Source) -> str:
    """What adapter_config.json says it was trained on; "" where it says nothing."""
    base = read_json(source.path / "adapter_config.json").get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise InputError(
            f"{source.path}: base_model_name_or_path of adapter_config.json is {shown(base)}, but must be a string."
        )
    return base


def _base_of(source: Source) -> Source:
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


def _load_adapter(
    source: Source, *, dtype: str, param_dtype: str, mesh: Mesh | None, attention: str
) -> LoadedModel:
    """A PEFT adapter on its base model, not merged."""
    base = load_model(_base_of(source), dtype=dtype, param_dtype=param_dtype, mesh=mesh, attention=attention)
    if base.lora.rank:
        raise InputError(
            f"{source.name}: its base model {base.source.name} has an adapter itself; merge that first."
        )
    lora, leaves = load_adapter(source.path, base.config)
    return dataclasses.replace(
        base,
        params=combine(base.params, leaves),
        tokenizer=load_tokenizer(source.path) or base.tokenizer,
        model=make_model(base.config, dtype=dtype, attention=attention, lora=lora),
        source=source,
    )
