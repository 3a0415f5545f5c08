"""`transformers` generate: left padding, SDPA attention, the cache by --cache; stops at the last row's length."""

from __future__ import annotations

import argparse
import os
import pathlib

import numpy as np
import torch
import transformers

from experiments.bench.generation_contract import Work, load_prompts, serve


class AllDone(transformers.StoppingCriteria):
    """Each row stops at its own number of new tokens."""

    def __init__(self, prompt: int, lengths: list[int]) -> None:
        self._ends = torch.tensor([prompt + length for length in lengths])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """bool `[B]`: which rows are done."""
        del scores, kwargs
        return input_ids.shape[1] >= self._ends


def main() -> None:
    """Serves the settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=pathlib.Path, required=True)
    parser.add_argument("--cache", default="dynamic", choices=("dynamic", "static"))
    flags = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        flags.rows / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    prompts = load_prompts(flags.rows)

    @torch.inference_mode()
    def batch(rows: list[np.ndarray], lengths: list[int], samples: int) -> list[list[int]]:
        width = max(len(row) for row in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = torch.from_numpy(row)
            mask[index, width - len(row) :] = 1
        each = [length for length in lengths for _ in range(samples)]
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(lengths),
            do_sample=samples > 1,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            cache_implementation="static" if flags.cache == "static" else None,
            disable_compile=True,
            stopping_criteria=[AllDone(width, each)],
        )
        return [row[width : width + length].tolist() for row, length in zip(out, each, strict=True)]

    def run(work: Work) -> list[list[int]]:
        answers: list[list[int]] = []
        lengths, prompts_at_once = work.lengths(), work.batch // work.samples
        for first in range(0, work.prompts, prompts_at_once):
            part = slice(first, min(first + prompts_at_once, work.prompts))
            answers += batch(prompts[part], lengths[part], work.samples)
        return answers

    serve(run, {"torch": torch.__version__, "transformers": transformers.__version__})


if __name__ == "__main__":
    main()
