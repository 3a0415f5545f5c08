"""Exports a trained model as a Hugging Face folder that `transformers` loads with equal logits.

A reward model becomes a folder for AutoModelForSequenceClassification, with equal scores. Any other MODEL
(a .gguf file, for instance) becomes a folder too, and a LoRA run can become a PEFT adapter (--adapter_only). Of an
ensemble of reward models one member is exported at a time.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch import entry
from posttrain_jax.core.errors import InputError

if TYPE_CHECKING:
    from posttrain_jax.models.io.load import LoadedModel

EXAMPLE = "python -m launch.export --workdir=runs/smollm2 --out=exports/smollm2"


def define_flags() -> None:
    """The command line; not at import, so that modules with like-named flags can be imported together."""
    flags.DEFINE_string("workdir", None, "The run, DIR or DIR@STEP (or any other MODEL).")
    flags.DEFINE_string("out", None, "The folder to write.")
    flags.DEFINE_string("dtype", "float32", "Type of the weights in the export: float32 or bfloat16.")
    flags.DEFINE_bool("adapter_only", False, "Write the LoRA adapter alone, in PEFT's format, not merged.")
    flags.DEFINE_integer("member", None, "Which model of an ensemble of reward models, from 0.")
    flags.DEFINE_bool(
        "ema",
        None,
        "The moving average of the weights (--noema: the last ones); default: those that the run evaluates.",
    )
    flags.DEFINE_bool("overwrite", False, "Replace what is in the folder.")


def main(argv: Sequence[str]) -> int:
    """Exports, and prints where the folder lies."""
    del argv
    given = flags.FLAGS
    if given.workdir is None or given.out is None:
        raise InputError(f"--workdir and --out are needed; an example: {EXAMPLE}")
    entry.set_up_jax()
    from posttrain_jax.models.io.hf_config import read_json

    out = Path(given.out).expanduser()
    step = export(
        given.workdir,
        out,
        dtype=given.dtype,
        adapter_only=given.adapter_only,
        ema=given.ema,
        member=given.member,
        overwrite=given.overwrite,
    )
    what = "adapter" if given.adapter_only else "model"
    print(f"The {what}{'' if step is None else f' of step {step}'} lies in {out}.")
    bias = None if given.adapter_only else read_json(out / "config.json").get("score_bias")
    if bias is not None:
        print(f"Its scores are those of transformers + {bias:.9g} (score_bias in its config.json).")
    return 0


def export(
    name: str,
    out: Path,
    *,
    dtype: str = "float32",
    adapter_only: bool = False,
    ema: bool | None = None,
    member: int | None = None,
    overwrite: bool = False,
) -> int | None:
    """Writes the folder `out` and says which weights; returns the step of the checkpoint that was taken.

    Raises:
      InputError: no such run, step or member, a run without an adapter, or something in the folder already.
    """
    from posttrain_jax.models.io.export import export_hf
    from posttrain_jax.models.io.load import load_members, load_model
    from posttrain_jax.models.io.source import member_count, resolve

    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={dtype} is not a type that can be exported; use float32 or bfloat16.")
    source = resolve(name)
    _refuse(out, overwrite, source.path)
    if member is None:
        loaded = load_model(source, ema=ema)
    else:
        count = member_count(source)
        if not 0 <= member < count:
            has = f"the members 0 to {count - 1}" if count else "no ensemble, so it has no members"
            raise InputError(f"--member={member}: {name} holds {has}.")
        loaded = load_members(source, ema=ema)[member]
    if loaded.source.weights:
        which = "moving average of the weights" if loaded.source.weights == "ema" else "last weights"
        print(f"Exporting the {which} of {name}.")
    if adapter_only:
        _export_adapter(loaded, out)
        return loaded.source.step
    export_hf(
        out,
        config=loaded.config,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        lora=loaded.lora,
        original=loaded.original,
        generation=loaded.generation,
        dtype=dtype,
        overwrite=overwrite,
    )
    return loaded.source.step


def _refuse(out: Path, overwrite: bool, source: Path) -> None:
    """Refuses a bad `out` before minutes of loading."""
    inside = source.resolve() == out.resolve() or out.resolve() in source.resolve().parents
    if inside:
        raise InputError(f"--out={out} holds the model that is exported; give another folder.")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file; give a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(
            f"--out={out} is not empty; give another folder, or --overwrite to replace what is in it."
        )


def _export_adapter(loaded: LoadedModel, out: Path) -> None:
    """A PEFT folder, written beside `out` and renamed when it is complete."""
    from posttrain_jax.core.workdir import is_workdir
    from posttrain_jax.models.io.export import put_in_place
    from posttrain_jax.models.io.peft import save_adapter
    from posttrain_jax.models.io.source import base_path
    from posttrain_jax.models.io.tokenizer import save_tokenizer

    if not loaded.lora.rank:
        raise InputError(f"--adapter_only: {loaded.source.name} has no LoRA adapter; leave the flag out.")
    if "score_head" in loaded.params:
        raise InputError(
            f"--adapter_only: {loaded.source.name} is a reward model, and its score head is no part of an adapter; "
            "leave the flag out."
        )
    base = base_path(loaded.source)
    if base and not Path(base).is_absolute() and not base.startswith("hf:"):
        print(f"The adapter names its base model {base}, as a name on the Hugging Face Hub.", file=sys.stderr)
    if base and (Path(base).is_file() or is_workdir(Path(re.sub(r"@\d+$", "", base)))):
        print(
            f"PEFT cannot load the base model {base} (it is no Hugging Face folder): export it with python -m "
            f"launch.export --workdir={base} --out=FOLDER, and write FOLDER into adapter_config.json.",
            file=sys.stderr,
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            made = Path(scratch) / "adapter"
            save_adapter(loaded.params, loaded.lora, loaded.config, made, base_model=base)
            if loaded.tokenizer is not None:
                save_tokenizer(loaded.tokenizer, made)
            put_in_place(made, out)
    except OSError as error:
        raise InputError(f"--out={out} cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
    define_flags()
    entry.run(main, example=EXAMPLE)
