"""The plain PyTorch loop: a transformers model, AdamW, the packed rows, two dozen lines. A harder mark than TRL.

Variants: "" takes logits at the trained positions only, the faster; "all_logits" at every position, as
`model(labels=...)` does.
"""

from __future__ import annotations

import torch
import transformers

from experiments.bench.contract import PackedRows, Recorder, load_packed, parse_settings


def block_causal(segment_ids: torch.Tensor) -> torch.Tensor:
    """bool `[B, 1, T, T]`: a token sees the earlier ones of its own sequence. Padding sees padding, so no row of the
    softmax is empty."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return torch.tril(same)[:, None]


def mean_loss(model: transformers.LlamaForCausalLM, batch: PackedRows, all_logits: bool) -> torch.Tensor:
    """Cross-entropy, mean over the trained tokens."""
    tokens = torch.from_numpy(batch.tokens).long()
    trained = torch.from_numpy(batch.loss_mask).bool()[:, 1:]
    hidden = model.model(
        input_ids=tokens,
        attention_mask=block_causal(torch.from_numpy(batch.segment_ids)),
        position_ids=torch.from_numpy(batch.positions).long(),
        use_cache=False,
    ).last_hidden_state[:, :-1]
    if all_logits:
        labels = tokens[:, 1:].masked_fill(~trained, -100)
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels.flatten())
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[trained]), tokens[:, 1:][trained])


def main() -> None:
    """Trains for a few steps and prints the line."""
    settings = parse_settings(__doc__)
    if settings.variant not in ("", "all_logits"):
        raise SystemExit(f"error: unknown variant {settings.variant!r}")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.rows / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train()
    if settings.lora_rank:
        from experiments.bench.adapters import add_lora

        model = add_lora(model, settings.lora_rank).base_model.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    recorder = Recorder("torch", settings, versions)
    batches = list(load_packed(settings.rows).batches(settings))
    recorder.start()
    for batch in batches:
        loss = mean_loss(model, batch, settings.variant == "all_logits")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.step(loss=loss.item(), real=batch.real, trained=batch.trained)
    recorder.finish()


if __name__ == "__main__":
    main()
