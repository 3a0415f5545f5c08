"""Writes what every side of the preference benchmark reads: the model, the pairs as token ids, and a reward head.

python -m experiments.bench.preferences_prepare --out=experiments/bench/rows/pairs100x512 --count=100 --max_length=512

The folder gets `model/` (float32 safetensors, tokenizer), `preferences/` (posttrain_jax's own store of the pairs),
`pairs.jsonl` (the same pairs, token by token), `head.npy`, and `info.json`, written last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil

import numpy as np
from transformers import PreTrainedTokenizerBase

from experiments.bench.preferences_contract import Pair
from posttrain_jax.data.preference_groups import Group, PreferenceSource
from posttrain_jax.data.tokenized import TokenizeOptions
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.demo import assets
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.io.tokenizer import load_tokenizer

SEED = 0


def load_source(rows: pathlib.Path, count: int, max_length: int) -> PreferenceSource:
    """The first `count` rows of dpo_en_demo whose two sequences fit into `max_length` tokens, or all where fewer do.

    They come from the store in `rows`, which is made where it is not there.
    """
    tokenizer = load_tokenizer(rows / "model")
    if tokenizer is None:
        raise SystemExit("error: the model has no tokenizer")
    return _source(rows, tokenizer, count, max_length)


def _source(
    rows: pathlib.Path, tokenizer: PreTrainedTokenizerBase, count: int, max_length: int
) -> PreferenceSource:
    options = TokenizeOptions(max_length=max_length, truncate="drop")
    path = str(assets.fetch("dpo_en_demo"))
    source = build_preferences(path, tokenizer, options, cache_dir=rows).sources[0]
    return source.select(np.arange(min(count, len(source))))


def pair_of(group: Group) -> Pair:
    """A group of one comparison as token ids.

    Raises:
      ValueError: the sequences do not have the form that PyTorch trainers know, a prompt and one trained stretch.
    """
    comparison = group.comparisons[0]
    chosen, rejected = (group.sequences[place] for place in (comparison.better, comparison.worse))
    prompt = int(np.argmax(chosen.loss_mask))
    stops = []
    for encoded in (chosen, rejected):
        places = np.flatnonzero(encoded.loss_mask)
        stops.append(int(places[-1]) + 1)
        if places[0] != prompt or len(places) != stops[-1] - prompt:
            raise ValueError(f"pair {group.number} is not a prompt with one trained stretch after it")
    if not np.array_equal(chosen.tokens[:prompt], rejected.tokens[:prompt]):
        raise ValueError(f"the two sequences of pair {group.number} begin with different prompts")
    return Pair(chosen.tokens.tolist(), rejected.tokens.tolist(), prompt, *stops)


def main() -> None:
    """Does nothing when the folder is there already."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=512)
    flags = parser.parse_args()
    if (flags.out / "info.json").is_file():
        return
    flags.out.mkdir(parents=True, exist_ok=True)
    for made_of_other_pairs in flags.out.glob("trl_*"):
        shutil.rmtree(made_of_other_pairs)

    loaded = load_model(str(assets.fetch("smollm2-135m-instruct")))
    if loaded.tokenizer is None:
        raise SystemExit("error: the model has no tokenizer")
    export_hf(
        flags.out / "model",
        config=loaded.config,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        dtype="float32",
        overwrite=True,
    )
    width = loaded.config.d_model
    head = np.random.default_rng(SEED).normal(size=(width, 1)) / (width + 1) ** 0.5
    np.save(flags.out / "head.npy", head.astype(np.float32))

    source = load_source(flags.out, flags.count, flags.max_length)
    pairs = [pair_of(source.group(i)) for i in range(len(source))]
    with (flags.out / "pairs.jsonl").open("w", encoding="utf-8") as out:
        for pair in pairs:
            out.write(json.dumps(dataclasses.asdict(pair)) + "\n")
    which = (
        f"the first {len(pairs)} pairs of dpo_en_demo that fit {flags.max_length} tokens"
        if len(pairs) == flags.count
        else f"the {len(pairs)} pairs of dpo_en_demo that fit {flags.max_length} tokens ({flags.count} were asked for)"
    )
    info = {
        "data": which,
        "model": "SmolLM2-135M-Instruct, float32",
        "pairs": len(pairs),
        "max_length": flags.max_length,
        "tokens": sum(pair.tokens for pair in pairs),
        "shared_prompt_tokens": sum(pair.prompt for pair in pairs),
        "trained_tokens": sum(p.chosen_trained + p.rejected_trained - 2 * p.prompt for p in pairs),
        "longest": max(max(len(pair.chosen), len(pair.rejected)) for pair in pairs),
    }
    (flags.out / "info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(info))


if __name__ == "__main__":
    main()
