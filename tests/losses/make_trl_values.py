"""Makes trl_values.json: what TRL's own trainers compute on a few pairs. Run in an environment with trl 1.16.0:

    python tests/losses/make_trl_values.py

The trainers are made without their constructors, with the attributes that the called method reads. Models are
stand-ins that look up stored log-probabilities (or scores) by the row's first token; everything after the forward
pass is TRL's code. A call with one pair returns that pair's loss, for the mean over one pair is the pair.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import types

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import trl
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

HERE = pathlib.Path(__file__).parent

# Multiples of 1/64, exact in float32. Pairs: policy above and below the reference, nearly equal, far apart.
PAIRS = {
    "policy_chosen_logps": [-21.5, -40.25, -12.015625, -96.5, -5.75, -63.140625],
    "policy_rejected_logps": [-33.25, -38.5, -12.0, -31.125, -44.875, -60.015625],
    "reference_chosen_logps": [-24.0, -39.5, -11.96875, -88.25, -9.5, -63.0],
    "reference_rejected_logps": [-30.5, -39.0, -12.0625, -34.5, -21.375, -60.03125],
    "chosen_lengths": [12, 20, 5, 31, 3, 16],
    "rejected_lengths": [17, 14, 5, 9, 22, 15],
}
SCORES = {
    "chosen": [1.25, -0.5, 0.0, 3.75, -7.5],
    "rejected": [-0.75, 0.25, 0.0, 4.0, -20.0],
    "margins": [1.0, 0.6640625, 0.328125, 0.0, 3.0],
}
# Name of the function here: (TRL's loss_type, beta, label_smoothing).
DPO_LOSSES = {
    "dpo_loss": ("sigmoid", 0.125, 0.0),
    "hinge_loss": ("hinge", 0.125, 0.0),
    "ipo_mean_loss": ("ipo", 0.25, 0.0),
    "exo_loss": ("exo_pair", 0.125, 0.0625),
    "nca_loss": ("nca_pair", 0.125, 0.0),
    "robust_dpo_loss": ("robust", 0.125, 0.25),
    "bco_pair_loss": ("bco_pair", 0.125, 0.0),
    "sppo_hard_loss": ("sppo_hard", 0.03125, 0.0),
    "apo_zero_loss": ("apo_zero", 0.125, 0.0),
    "apo_down_loss": ("apo_down", 0.125, 0.0),
    "normalized_dpo_loss": ("sigmoid_norm", 4.0, 0.0),
}


class _Accelerator:
    device = torch.device("cpu")

    def gather(self, values):
        return values

    gather_for_metrics = gather


class _LogProbs(torch.nn.Module):
    """Returns the stored log-probabilities of the rows whose number is the first token."""

    def __init__(self, sums: list[float], lengths: list[int]):
        super().__init__()
        longest = max(lengths)
        self.table = torch.zeros((len(sums), longest), dtype=torch.float64)
        for row, (total, length) in enumerate(zip(sums, lengths, strict=True)):
            parts = torch.arange(1, length + 1, dtype=torch.float64)
            self.table[row, :length] = total * parts / parts.sum()
        self.tokens = torch.zeros((len(sums), longest + 1), dtype=torch.long)
        self.tokens[:, 0] = torch.arange(len(sums))
        steps = torch.arange(longest + 1)
        self.completion_mask = ((steps >= 1) & (steps <= torch.tensor(lengths)[:, None])).long()

    def forward(self, input_ids, attention_mask, labels, use_cache, fused_lm_head):
        log_probs = self.table[input_ids[:, 0]]
        zeros = torch.zeros_like(log_probs)
        return types.SimpleNamespace(
            log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    def inputs(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.tokens[rows],
            "attention_mask": torch.ones_like(self.tokens[rows]),
            "completion_mask": self.completion_mask[rows],
        }


def _trainer(cls, attributes):
    trainer = object.__new__(cls)
    shared = {
        "accelerator": _Accelerator(),
        "_metrics": {mode: collections.defaultdict(list) for mode in ("train", "eval")},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
    }
    for name, value in {**shared, **attributes}.items():
        setattr(trainer, name, value)
    return trainer


def dpo_values() -> dict:
    """Loss and metrics of every pair, for each of TRL's loss types."""
    pairs = len(PAIRS["policy_chosen_logps"])
    model = _LogProbs(
        PAIRS["policy_chosen_logps"] + PAIRS["policy_rejected_logps"],
        PAIRS["chosen_lengths"] + PAIRS["rejected_lengths"],
    )
    values = {}
    for name, (loss_type, beta, label_smoothing) in DPO_LOSSES.items():
        losses, metrics = [], []
        for pair in range(pairs):
            trainer = _trainer(
                DPOTrainer,
                {
                    "model": model,
                    "ld_alpha": None,
                    "f_divergence_type": "reverse_kl",
                    "loss_types": [loss_type],
                    "loss_weights": [1.0],
                    "beta": beta,
                    "label_smoothing": label_smoothing,
                    "use_weighting": False,
                },
            )
            inputs = model.inputs([pair, pairs + pair])
            for side in ("chosen", "rejected"):
                reference = [PAIRS[f"reference_{side}_logps"][pair]]
                inputs[f"ref_{side}_logps"] = torch.tensor(reference, dtype=torch.float64)
            losses.append(DPOTrainer._compute_loss(trainer, model, inputs, False).item())
            metrics.append({key: value[0] for key, value in trainer._metrics["train"].items()})
        names = [key for key in metrics[0] if key.startswith(("rewards/", "logps/"))]
        values[name] = {
            "beta": beta,
            "label_smoothing": label_smoothing,
            "loss": losses,
            "metrics": {key: sum(row[key] for row in metrics) / pairs for key in names},
        }
    return values


def kto_values() -> dict:
    """TRL's KTO on the answers of the pairs, with the chosen answers' neighbors as mismatched answers."""
    sums = PAIRS["policy_chosen_logps"] + PAIRS["policy_rejected_logps"]
    reference = PAIRS["reference_chosen_logps"] + PAIRS["reference_rejected_logps"]
    model = _LogProbs(sums, PAIRS["chosen_lengths"] + PAIRS["rejected_lengths"])
    pairs = len(PAIRS["policy_chosen_logps"])
    mismatched = [0, 2, 4]  # rows whose log-ratios TRL averages into z0
    losses, baselines = [], []
    for row in range(2 * pairs):
        trainer = _trainer(
            KTOTrainer,
            {
                "model": model,
                "calculate_KL": True,
                "loss_type": "kto",
                "beta": 0.125,
                "desirable_weight": 1.25,
                "undesirable_weight": 0.75,
            },
        )
        kl_inputs = {f"KL_{key}": value for key, value in model.inputs(mismatched).items()}
        inputs = {
            **model.inputs([row]),
            **kl_inputs,
            "label": torch.tensor([row < pairs]),
            "ref_logps": torch.tensor([reference[row]], dtype=torch.float64),
            "ref_KL_logps": torch.tensor([reference[i] for i in mismatched], dtype=torch.float64),
        }
        losses.append(KTOTrainer._compute_loss(trainer, model, inputs, False).item())
        baselines.append(trainer._metrics["train"]["kl"][0])
    return {
        "beta": 0.125,
        "desirable_weight": 1.25,
        "undesirable_weight": 0.75,
        "mismatched": mismatched,
        "kl_baseline": baselines[0],
        "loss": losses,
    }


def _float64(name: str) -> torch.Tensor:
    return torch.tensor(PAIRS[name], dtype=torch.float64)


def reference_free_values() -> dict:
    """TRL's CPO and SimPO (`cpo_loss`) and ORPO's odds term (`odds_ratio_loss`)."""
    chosen, rejected = _float64("policy_chosen_logps"), _float64("policy_rejected_logps")
    chosen_mean = chosen / _float64("chosen_lengths")
    rejected_mean = rejected / _float64("rejected_lengths")

    def cpo(loss_type, beta, gamma, first, second):
        attributes = {
            "alpha": 0.0,
            "loss_type": loss_type,
            "beta": beta,
            "simpo_gamma": gamma,
            "label_smoothing": 0.0,
        }
        return CPOTrainer.cpo_loss(_trainer(CPOTrainer, attributes), first, second)

    losses, rewards, _ = cpo("sigmoid", 0.125, 0.0, chosen, rejected)
    values = {"cpo_loss": {"beta": 0.125, "loss": losses.tolist(), "chosen_rewards": rewards.tolist()}}
    losses, rewards, _ = cpo("simpo", 2.0, 0.5, chosen_mean, rejected_mean)
    values["simpo_loss"] = {
        "beta": 2.0,
        "gamma": 0.5,
        "loss": losses.tolist(),
        "chosen_rewards": rewards.tolist(),
    }
    orpo = _trainer(ORPOTrainer, {"beta": 0.25})
    ratio_losses, rewards, _, _, log_odds = ORPOTrainer.odds_ratio_loss(orpo, chosen_mean, rejected_mean)
    values["orpo_loss"] = {
        "lambda": 0.25,
        "odds_loss": (-ratio_losses).tolist(),
        "chosen_rewards": rewards.tolist(),
        "mean_log_odds_ratio": log_odds.item(),
    }
    return values


class _Scores(torch.nn.Module):
    def __init__(self, scores: list[float]):
        super().__init__()
        self.scores = torch.tensor(scores, dtype=torch.float64)

    def forward(self, input_ids, use_cache, margin=None):
        return types.SimpleNamespace(logits=self.scores[input_ids[:, 0]][:, None])


def reward_values() -> dict:
    """TRL's reward trainer: Bradley-Terry, with margins, and with the centering penalty."""
    pairs = len(SCORES["chosen"])
    model = _Scores(SCORES["chosen"] + SCORES["rejected"]).eval()

    def losses(coefficient, with_margin):
        values = []
        for pair in range(pairs):
            args = types.SimpleNamespace(center_rewards_coefficient=coefficient)
            trainer = _trainer(RewardTrainer, {"model": model, "args": args})
            inputs = {"input_ids": torch.tensor([[pair], [pairs + pair]])}
            if with_margin:
                inputs["margin"] = torch.tensor([SCORES["margins"][pair]], dtype=torch.float64)
            values.append(RewardTrainer.compute_loss(trainer, model, inputs).item())
        return values

    return {
        "bradley_terry_loss": {"loss": losses(None, False)},
        "margin_loss": {"loss": losses(None, True)},
        "bradley_terry_with_center_penalty": {"coefficient": 0.0625, "loss": losses(0.0625, False)},
    }


def main() -> None:
    if trl.__version__ != "1.16.0":
        raise SystemExit(f"The values are those of trl 1.16.0; this is {trl.__version__}.")
    values = {
        "made_by": f"make_trl_values.py with trl {trl.__version__}",
        "pairs": PAIRS,
        "scores": SCORES,
        "dpo": dpo_values(),
        "kto": kto_values(),
        "reference_free": reference_free_values(),
        "reward": reward_values(),
    }
    (HERE / "trl_values.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
