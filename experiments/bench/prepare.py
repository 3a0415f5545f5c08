"""Writes what every side of the benchmark reads: the model as a Hugging Face folder, and the rows as token ids.

python -m experiments.bench.prepare --out=experiments/bench/rows/200x512 --count=200 --max_length=512

The folder gets `model/` (float32 safetensors, tokenizer), `sequences.jsonl` (tokens and loss mask of each row of the
data), `packed.npz` (the same sequences packed, shuffled with a fixed seed) and `info.json`, written last.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile

import numpy as np

from posttrain_jax.data import packing, tokenized
from posttrain_jax.demo import assets
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.io.load import load_model

SEED = 0


def main() -> None:
    """Does nothing when the folder is there already."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--max_length", type=int, default=512)
    flags = parser.parse_args()
    if (flags.out / "info.json").is_file():
        return
    flags.out.mkdir(parents=True, exist_ok=True)

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

    rows = json.loads(assets.fetch("alpaca_en_demo").read_text(encoding="utf-8"))[: flags.count]
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "rows.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        options = tokenized.TokenizeOptions(max_length=flags.max_length)
        data = tokenized.build(str(path), loaded.tokenizer, options)
        source = data.sources[0]
        order = np.random.default_rng(SEED).permutation(len(source))
        shuffled = tokenized.TokenizedData((source.select(order),))
        packed = packing.pack(shuffled, flags.max_length)[0]
        # Best fit puts the fullest rows first; shuffled, every step has about as many tokens.
        row_order = np.random.default_rng(SEED + 1).permutation(len(packed))
        arrays = [packed[int(row)] for row in row_order]
        stacked = {key: np.stack([row[key] for row in arrays]) for key in packing.KEYS}
        np.savez(
            flags.out / "packed.npz",
            tokens=stacked["tokens"],
            loss_mask=stacked["loss_mask"],
            segment_ids=stacked["segment_ids"],
            positions=stacked["positions"],
        )
        with (flags.out / "sequences.jsonl").open("w", encoding="utf-8") as out:
            for i in range(len(source)):
                encoded = shuffled.sources[0].sequence(i)
                row = {"tokens": encoded.tokens.tolist(), "loss_mask": encoded.loss_mask.astype(int).tolist()}
                out.write(json.dumps(row) + "\n")
        info = {
            "data": f"the first {flags.count} rows of alpaca_en_demo",
            "model": "SmolLM2-135M-Instruct, float32",
            "max_length": flags.max_length,
            "sequences": len(source),
            "packed_rows": len(packed),
            "tokens": source.report.tokens,
            "trained_tokens": source.report.trained_tokens,
            "packing_efficiency": packing.efficiency([packed]),
        }
        (flags.out / "info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(info))


if __name__ == "__main__":
    main()
