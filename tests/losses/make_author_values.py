"""Makes author_values.json: the losses of trl_values.json's pairs, and their gradients, by the code of their authors.

    python tests/losses/make_author_values.py FOLDER

needs torch, and FOLDER holding the files of SOURCES, each from the repository and commit (or the wheel) named there.
Only the function is taken out of its file and run, in float64, with the attributes of `self` that it reads.
"""

from __future__ import annotations

import ast
import json
import pathlib
import sys
import types
import typing

import torch

HERE = pathlib.Path(__file__).parent
PAIRS = json.loads((HERE / "trl_values.json").read_text(encoding="utf-8"))["pairs"]
EXTRA = json.loads((HERE / "paper_values.json").read_text(encoding="utf-8"))["extra"]

SIDES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
WITH_GRADIENT = ("policy_chosen_logps", "policy_rejected_logps", "chosen_kls", "rejected_kls")

# Path in FOLDER: (function, where it is from).
SOURCES = {
    "direct-preference-optimization/trainers.py": (
        "preference_loss",
        "github.com/eric-mitchell/direct-preference-optimization at f8b8c0f49dc92a430bae41585f9d467d3618fe2f",
    ),
    "Token-level-Direct-Preference-Optimization/trainers.py": (
        "tdpo_loss",
        "github.com/Vance0124/Token-level-Direct-Preference-Optimization at 2a736ecb285394a8419b461816bce1ba3b093cc9",
    ),
    "NeMo-Aligner/nemo_aligner/models/nlp/gpt/megatron_gpt_dpo_model.py": (
        "loss_func",
        "github.com/NVIDIA/NeMo-Aligner at af2b3bd96ad78190f6ebfb552b9e599e313ce027",
    ),
    "SPPO/sppo/trainer.py": (
        "sppo_loss",
        "github.com/uclaml/SPPO at 5e61c4e90822fe526d8bbe1a50a6e85a85c30911",
    ),
    "trl-0.24.0/trl/trainer/bco_trainer.py": (
        "bco_loss",
        "the wheel trl 0.24.0, whose later versions lack BCO",
    ),
}


def functions(folder: pathlib.Path) -> dict[str, typing.Callable]:
    """The functions of SOURCES by name."""
    found = {}
    for path, (name, _) in SOURCES.items():
        tree = ast.parse((folder / path).read_text(encoding="utf-8"))
        bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
        (node,) = (n for body in bodies for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
        names = {"torch": torch, "F": torch.nn.functional, **vars(typing)}
        exec(compile(ast.Module([node], []), path, "exec"), names)
        found[name] = names[name]
    return found


class FirstBatchMean:
    """TRL's running mean of rewards after its first batch: the mean of the batch."""

    def update(self, rewards: torch.Tensor) -> None:
        self.mean = rewards.mean()


def main() -> None:
    found = functions(pathlib.Path(sys.argv[1]))
    inputs = {name: torch.tensor(values, dtype=torch.float64) for name, values in (PAIRS | EXTRA).items()}
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    pairs = [inputs[f"{side}_logps"] for side in SIDES]
    margins = (pairs[0] - pairs[2], pairs[1] - pairs[3])
    kls = (inputs["chosen_kls"], inputs["rejected_kls"])
    ratings = (inputs["chosen_ratings"], inputs["rejected_ratings"])
    win_rates = (inputs["chosen_win_rates"].detach(), inputs["rejected_win_rates"].detach())

    accelerator = types.SimpleNamespace(device=torch.device("cpu"))
    sppo = types.SimpleNamespace(beta=0.03125, loss_type="sppo", label_smoothing=0.0, accelerator=accelerator)
    running = FirstBatchMean()
    bco = types.SimpleNamespace(beta=0.125, running=running, match_underlying_distribution=False)

    def rpo(pair: int) -> torch.Tensor:
        """NeMo-Aligner's mean over a batch of one pair."""
        split = types.SimpleNamespace(
            preference_loss="rpo_bwd_kl",
            ref_policy_kl_penalty=0.125,
            gt_reward_scale=0.5,
            get_reduced_masked_logps=lambda *_, **__: tuple(margin[pair : pair + 1] for margin in margins),
            split_output_tensor=lambda both: both,
        )
        rated = tuple(rating[pair : pair + 1].detach() for rating in ratings)
        return found["loss_func"](split, torch.zeros(1), torch.zeros(1), None, rated)[0]

    def bco_both() -> torch.Tensor:
        losses = found["bco_loss"](bco, *pairs, None, None)[0]
        return losses[: len(pairs[0])] + losses[len(pairs[0]) :]

    losses = {
        "cdpo_loss": found["preference_loss"](*pairs, beta=0.125, label_smoothing=0.25)[0],
        "ipo_loss": found["preference_loss"](*pairs, beta=0.25, ipo=True)[0],
        "tdpo1_loss": found["tdpo_loss"](*margins, *kls, beta=0.125, if_tdpo2=False)[0],
        "tdpo2_loss": found["tdpo_loss"](*margins, *kls, beta=0.125, alpha=0.5)[0],
        "rpo_loss": torch.stack([rpo(pair) for pair in range(len(pairs[0]))]),
        "sppo_loss": found["sppo_loss"](
            sppo, *pairs, chosen_probs_win=win_rates[0], chosen_probs_lose=win_rates[1]
        )[0],
        "bco_loss": bco_both(),
    }
    values = {"sources": dict(SOURCES.values()), "bco_delta": float(running.mean)}
    values["losses"] = {
        name: {
            "loss": loss.tolist(),
            "gradients": {
                key: gradient.tolist()
                for key, gradient in zip(
                    WITH_GRADIENT,
                    torch.autograd.grad(
                        loss.sum(), [inputs[key] for key in WITH_GRADIENT], allow_unused=True
                    ),
                    strict=True,
                )
                if gradient is not None
            },
        }
        for name, loss in losses.items()
    }
    (HERE / "author_values.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
