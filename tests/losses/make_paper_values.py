"""Makes paper_values.json: losses that TRL lacks, evaluated from their papers' equations in float64 NumPy.

    python tests/losses/make_paper_values.py

No part of the package is imported. The equations are written with probabilities and ratios, as the papers print
them, where the package works with logarithms; float64 bears that for these inputs.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
TRL = json.loads((HERE / "trl_values.json").read_text(encoding="utf-8"))
PAIRS = {name: np.array(values, np.float64) for name, values in TRL["pairs"].items()}
EXTRA = {
    "chosen_kls": [1.5, 0.25, 0.0, 6.5, 2.0, 0.75],
    "rejected_kls": [0.5, 1.25, 0.0, 3.0, 8.0, 0.5],
    "chosen_ratings": [4.0, 3.5, 2.0, 1.0, 3.0, 2.5],
    "rejected_ratings": [1.5, 3.0, 2.0, 2.0, -1.0, 2.25],
    "chosen_win_rates": [0.75, 0.625, 0.5, 0.375, 1.0, 0.5625],
    "rejected_win_rates": [0.25, 0.5, 0.5, 0.25, 0.0, 0.4375],
    "target_logps": [-20.0, -41.0, -11.5, -90.0, -6.0, -62.0],
    "nlls": [21.5, 42.0, 13.0, 97.5, 6.25, 64.0],
    "nll_tokens": [12, 22, 6, 32, 4, 17],
}
KWISE = {
    "scores": [[0.5, -1.0, 2.0, 0.25], [1.0, 1.5, -0.5, 0.0], [-2.0, 3.0, 0.75, -0.25]],
    "ranks": [[1, 3, 0, 2], [0, 0, 1, 2], [2, 1, 0, 3]],
    "mask": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]],
}


def coin(odds):
    """The probability of an event from its odds, s(x) with odds = e^x."""
    return odds / (1 + odds)


def pair_values() -> dict:
    """Everything from the ratios of probabilities pi / pi_ref."""
    extra = {name: np.array(values, np.float64) for name, values in EXTRA.items()}
    chosen = np.exp(PAIRS["policy_chosen_logps"] - PAIRS["reference_chosen_logps"])
    rejected = np.exp(PAIRS["policy_rejected_logps"] - PAIRS["reference_rejected_logps"])
    beta = 0.125
    preferred = coin((chosen / rejected) ** beta)
    values = {}

    epsilon = 0.25  # cDPO, eq. 3: cross-entropy with the label (1 - epsilon, epsilon)
    values["cdpo_loss"] = {
        "beta": beta,
        "label_smoothing": epsilon,
        "loss": -np.log(preferred ** (1 - epsilon) * (1 - preferred) ** epsilon),
    }

    # IPO, eq. 17, with whole answers: (log of the ratio of ratios - 1 / (2 tau))^2, expanded.
    tau = 0.25
    h = np.log(chosen / rejected)
    values["ipo_loss"] = {"beta": tau, "loss": h**2 - h / tau + 1 / (4 * tau**2)}

    # R-DPO: the DPO coin whose log-odds get alpha per token by which the chosen answer is longer.
    alpha = 0.03125
    length_odds = np.exp(alpha * PAIRS["chosen_lengths"]) / np.exp(alpha * PAIRS["rejected_lengths"])
    values["rdpo_loss"] = {
        "beta": beta,
        "alpha": alpha,
        "loss": -np.log(coin((chosen / rejected) ** beta * length_odds)),
    }

    # DPOP: the chosen answer's ratio enters a further lambda times while it is below 1.
    lambda_ = 5.0
    penalty = np.where(chosen < 1, chosen**lambda_, 1.0)
    values["dpop_loss"] = {
        "beta": beta,
        "lambda": lambda_,
        "loss": -np.log(coin((chosen / rejected * penalty) ** beta)),
    }

    # TDPO1: e^(beta (u - delta)) with u the DPO difference and delta = K_l - K_w.
    kls = np.exp(extra["rejected_kls"] - extra["chosen_kls"])
    values["tdpo1_loss"] = {"beta": beta, "loss": np.log1p((chosen / rejected / kls) ** -beta)}
    values["tdpo2_loss"] = {
        "beta": beta,
        "alpha": 0.5,
        "loss": np.log1p((chosen / rejected / np.sqrt(kls)) ** -beta),
    }

    # RPO of Nemotron-4: cross-entropy of the two coins minus the entropy of the ratings' coin.
    eta = 0.5
    rated = coin(np.exp(eta * (extra["chosen_ratings"] - extra["rejected_ratings"])))
    cross_entropy = -rated * np.log(preferred) - (1 - rated) * np.log(1 - preferred)
    entropy = -rated * np.log(rated) - (1 - rated) * np.log(1 - rated)
    values["rpo_loss"] = {"beta": beta, "eta": eta, "loss": cross_entropy - entropy}

    # IRPO: DPO plus the NLL per token.
    values["dpo_nll_loss"] = {
        "beta": beta,
        "alpha": 0.25,
        "loss": np.log1p((rejected / chosen) ** beta) + 0.25 * extra["nlls"] / extra["nll_tokens"],
    }

    # SPPO, eq. 4.7, multiplied out by beta^2.
    sppo_beta = 0.03125
    chosen_error = sppo_beta * np.log(chosen) - extra["chosen_win_rates"] + 0.5
    rejected_error = sppo_beta * np.log(rejected) - extra["rejected_win_rates"] + 0.5
    values["sppo_loss"] = {"beta": sppo_beta, "loss": (chosen_error**2 + rejected_error**2) / sppo_beta**2}

    # BCO: the chosen answer's coin shows heads, the rejected one's tails; the shift divides the odds.
    shift = np.exp(-0.25)
    heads, tails = coin(chosen**beta / shift), 1 - coin(rejected**beta / shift)
    values["bco_loss"] = {"beta": beta, "delta": -0.25, "loss": -np.log(heads * tails)}

    # SLiC-HF: hinge on the log of the ratio of the two probabilities.
    ratio = np.exp(PAIRS["policy_chosen_logps"] - PAIRS["policy_rejected_logps"])
    hinge = np.log(np.maximum(1.0, np.e**2.0 / ratio))
    values["slic_loss"] = {"delta": 2.0, "lambda": 0.25, "loss": hinge - 0.25 * extra["target_logps"]}
    return {name: {**entry, "loss": entry["loss"].tolist()} for name, entry in values.items()}


def kwise_values() -> dict:
    """InstructGPT's eq. 1 and Plackett-Luce, answer by answer."""
    kwise, plackett_luce = [], []
    for scores, ranks, mask in zip(KWISE["scores"], KWISE["ranks"], KWISE["mask"], strict=True):
        answers = [(r, s) for s, r, m in zip(scores, ranks, mask, strict=True) if m]
        total = 0.0
        likelihood = 1.0
        for rank, score in answers:
            for other_rank, other in answers:
                if rank < other_rank:
                    total -= np.log(coin(np.exp(score - other)))
            likelihood *= np.exp(score) / sum(np.exp(other) for r, other in answers if r >= rank)
        kwise.append(total / (len(answers) * (len(answers) - 1) / 2))
        plackett_luce.append(-np.log(likelihood))
    return {"kwise_loss": [float(x) for x in kwise], "plackett_luce_loss": [float(x) for x in plackett_luce]}


def main() -> None:
    values = {
        "made_by": "make_paper_values.py",
        "extra": EXTRA,
        "pairs": pair_values(),
        "kwise": KWISE,
        "ranked": kwise_values(),
    }
    (HERE / "paper_values.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
