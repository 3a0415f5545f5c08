"""DPO and its variants: by hand, closed-form gradients, and the values of TRL and of the papers' equations.

In the tests by hand the pair has a_w = 1, a_l = -1 (so h = 2) unless said otherwise, from log pi = -1, -3 and
log pi_ref = -2, -2; with beta = 1/2, beta h = 1. s is the logistic function, and -log s(x) = log(1 + e^-x).
"""

from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import anchored, dpo

HERE = pathlib.Path(__file__).parent
TRL = json.loads((HERE / "trl_values.json").read_text(encoding="utf-8"))
PAPER = json.loads((HERE / "paper_values.json").read_text(encoding="utf-8"))
AUTHORS = json.loads((HERE / "author_values.json").read_text(encoding="utf-8"))

PAIR = (jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([-2.0]), jnp.array([-2.0]))


def softplus(x: float) -> float:
    """log(1 + e^x) = -log s(-x)."""
    return math.log1p(math.exp(x))


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def close(loss, want: float) -> None:
    np.testing.assert_allclose(loss.loss_B, [want], rtol=1e-6)
    assert loss.count == 1


def test_dpo_by_hand():
    """-log s(1) = log(1 + e^-1) = 0.31326169. Rewards 1/2 and -1/2."""
    loss = dpo.dpo_loss(*PAIR, beta=0.5)
    close(loss, 0.31326169)
    values = {name: float(metric.sum / metric.count) for name, metric in loss.metrics.items()}
    assert values == pytest.approx(
        {
            "loss": 0.31326169,
            "rewards/chosen": 0.5,
            "rewards/rejected": -0.5,
            "rewards/margins": 1.0,
            "rewards/accuracies": 1.0,
            "logps/chosen": -1.0,
            "logps/rejected": -3.0,
        }
    )


def test_dpo_of_the_reference_itself_is_log_2_and_a_tie_is_no_win():
    logps = jnp.array([-5.0, -700.0])
    loss = dpo.dpo_loss(logps, logps - 3.0, logps, logps - 3.0, beta=0.1)
    np.testing.assert_allclose(loss.loss, [math.log(2), math.log(2)], rtol=1e-6)
    assert loss.metrics["rewards/accuracies"].sum == 0


def test_dpo_gradient_is_that_of_the_paper():
    """dL / dlog pi(y_w) = -beta s(r_l - r_w) and dL / dlog pi(y_l) = +beta s(r_l - r_w), section 4 of the paper.

    beta = 0.5: first pair r_w - r_l = 1, s(-1) = 0.26894142, so -/+ 0.13447071; second pair r_w - r_l = 0.5 ((0) -
    (-1)), s(-0.5) = 0.37754067, so -/+ 0.18877033. The reference's gradient is the opposite.
    """
    policy_chosen, policy_rejected = jnp.array([-1.0, -2.0]), jnp.array([-3.0, -3.0])
    reference = jnp.array([-2.0, -2.0])

    def total(*logps):
        return dpo.dpo_loss(*logps, beta=0.5).loss.sum()

    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(policy_chosen, policy_rejected, reference, reference)
    want = np.array([0.13447071, 0.18877033])
    for gradient, sign in zip(gradients, (-1, 1, 1, -1), strict=True):
        np.testing.assert_allclose(gradient, sign * want, rtol=1e-6)


def test_cdpo_by_hand():
    """0.9 * 0.31326169 + 0.1 * 1.31326169 = 0.41326169."""
    close(dpo.cdpo_loss(*PAIR, beta=0.5, label_smoothing=0.1), 0.41326169)


def test_cdpo_is_least_where_the_model_is_as_sure_as_the_labels():
    """s(beta h) = 0.75 at beta h = log 3: there the gradient is 0."""
    rejected = jnp.zeros(1)
    gradient = jax.grad(
        lambda chosen: dpo.cdpo_loss(
            chosen, rejected, rejected, rejected, beta=1.0, label_smoothing=0.25
        ).loss.sum()
    )(jnp.array([math.log(3.0)]))
    np.testing.assert_allclose(gradient, [0.0], atol=1e-7)


def test_robust_dpo_by_hand():
    """(0.9 * 0.31326169 - 0.1 * 1.31326169) / 0.8 = 0.18826169."""
    close(dpo.robust_dpo_loss(*PAIR, beta=0.5, label_smoothing=0.1), 0.18826169)


def test_robust_dpo_is_unbiased_under_flips():
    """0.75 * loss(pair) + 0.25 * loss(flipped pair) with e = 0.25 is DPO's loss of the pair, 0.31326169."""
    chosen, rejected, reference_chosen, reference_rejected = PAIR
    right = dpo.robust_dpo_loss(*PAIR, beta=0.5, label_smoothing=0.25)
    flipped = dpo.robust_dpo_loss(
        rejected, chosen, reference_rejected, reference_chosen, beta=0.5, label_smoothing=0.25
    )
    np.testing.assert_allclose(0.75 * right.loss + 0.25 * flipped.loss, [0.31326169], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
@pytest.mark.parametrize("loss", [dpo.cdpo_loss, dpo.robust_dpo_loss, dpo.exo_loss])
def test_label_smoothing_outside_its_range_is_refused(loss, smoothing):
    with pytest.raises(ValueError, match="share of wrong labels"):
        loss(*PAIR, beta=0.5, label_smoothing=smoothing)


def test_without_smoothing_cdpo_and_robust_dpo_are_dpo_and_exo_is_refused():
    close(dpo.cdpo_loss(*PAIR, beta=0.5, label_smoothing=0.0), 0.31326169)
    close(dpo.robust_dpo_loss(*PAIR, beta=0.5, label_smoothing=0.0), 0.31326169)
    with pytest.raises(ValueError, match="more than 0"):
        dpo.exo_loss(*PAIR, beta=0.5, label_smoothing=0.0)


def test_ipo_by_hand():
    """(2 - 1 / (2 * 1/2))^2 = 1; with tau = 1/4 the target is 2 = h and the loss 0."""
    close(dpo.ipo_loss(*PAIR, beta=0.5), 1.0)
    close(dpo.ipo_loss(*PAIR, beta=0.25), 0.0)


def test_ipo_per_token_by_hand():
    """a_w / 2 = 0.5, a_l / 4 = -0.25: (0.75 - 1)^2 = 0.0625; rewards 0.25 and -0.125."""
    loss = dpo.ipo_mean_loss(*PAIR, jnp.array([2]), jnp.array([4]), beta=0.5)
    close(loss, 0.0625)
    assert loss.metrics["rewards/chosen"].sum == 0.25
    assert loss.metrics["rewards/rejected"].sum == -0.125


def test_hinge_by_hand():
    """beta = 1/4: 1 - 2/4 = 0.5; beta = 1: 1 - 2 < 0, so 0."""
    close(dpo.hinge_loss(*PAIR, beta=0.25), 0.5)
    close(dpo.hinge_loss(*PAIR, beta=1.0), 0.0)


def test_normalized_dpo_by_hand():
    """beta (a_w / 2 - a_l / 4) = 0.5 * 0.75 = 0.375; an empty answer is divided by 1: 0.5 * (1 + 0.25) = 0.625."""
    close(
        dpo.normalized_dpo_loss(*PAIR, jnp.array([2]), jnp.array([4]), beta=0.5),
        softplus(-0.375),
    )
    close(
        dpo.normalized_dpo_loss(*PAIR, jnp.array([0]), jnp.array([4]), beta=0.5),
        softplus(-0.625),
    )


def test_rdpo_by_hand():
    """beta h + alpha (2 - 4) = 1 - 0.2 = 0.8."""
    close(dpo.rdpo_loss(*PAIR, jnp.array([2]), jnp.array([4]), beta=0.5, alpha=0.1), softplus(-0.8))


def test_rdpo_learns_less_from_pairs_whose_chosen_answer_is_longer():
    """Pull on log pi(y_w): beta s(-(beta h + alpha (|y_w| - |y_l|))) with beta h = 1, alpha (10 - 20) = -1 or +1:
    0.5 * s(0) = 0.25 when the chosen answer is the shorter one, 0.5 * s(-2) = 0.0596 when it is the longer one."""

    def pull(chosen_length, rejected_length):
        return -jax.grad(
            lambda chosen: dpo.rdpo_loss(
                chosen,
                *PAIR[1:],
                jnp.array([chosen_length]),
                jnp.array([rejected_length]),
                beta=0.5,
                alpha=0.1,
            ).loss.sum()
        )(PAIR[0])

    np.testing.assert_allclose(pull(10, 20), [0.25], rtol=1e-6)
    np.testing.assert_allclose(pull(20, 10), [0.5 * s(-2.0)], rtol=1e-6)


def test_dpop_by_hand():
    """a_w = 1 > 0: DPO. From log pi = -3, -4: a_w = -1, a_l = -2, h = 1, lambda = 5: 0.5 * (1 - 5) = -2."""
    close(dpo.dpop_loss(*PAIR, beta=0.5, lambda_=5.0), 0.31326169)
    close(
        dpo.dpop_loss(jnp.array([-3.0]), jnp.array([-4.0]), *PAIR[2:], beta=0.5, lambda_=5.0), softplus(2.0)
    )


def test_tdpo_by_hand():
    """K_w = 0.5, K_l = 1.5. TDPO1: 0.5 * (2 - 1) = 0.5; TDPO2 with alpha = 1/2: 0.5 * (2 - 0.5) = 0.75. Rewards
    0.5 * (1 + 0.5) = 0.75 and 0.5 * (-1 + 1.5) = 0.25."""
    kls = (jnp.array([0.5]), jnp.array([1.5]))
    loss = dpo.tdpo1_loss(*PAIR, *kls, beta=0.5)
    close(loss, softplus(-0.5))
    assert loss.metrics["rewards/chosen"].sum == 0.75
    assert loss.metrics["rewards/rejected"].sum == 0.25
    loss = dpo.tdpo2_loss(*PAIR, *kls, beta=0.5, alpha=0.5)
    close(loss, softplus(-0.75))
    assert loss.metrics["rewards/margins"].sum == 0.5


def test_tdpo2_gives_no_gradient_to_the_chosen_kl():
    """TDPO1: -beta s(-0.5) and +beta s(-0.5) = 0.18877033; TDPO2: 0 and beta alpha s(-0.75) = 0.25 s(-0.75)."""
    kls = (jnp.array([0.5]), jnp.array([1.5]))
    first = jax.grad(lambda *k: dpo.tdpo1_loss(*PAIR, *k, beta=0.5).loss.sum(), (0, 1))(*kls)
    np.testing.assert_allclose(first, [[-0.18877033], [0.18877033]], rtol=1e-6)
    second = jax.grad(lambda *k: dpo.tdpo2_loss(*PAIR, *k, beta=0.5, alpha=0.5).loss.sum(), (0, 1))(*kls)
    np.testing.assert_allclose(second, [[0.0], [0.25 * s(-0.75)]], rtol=1e-6)


def test_exo_by_hand():
    """q = s(1) = 0.73105858: 0.73105858 (-0.31326169 - log 0.9) + 0.26894142 (-1.31326169 - log 0.1)
    = 0.73105858 * -0.20790117 + 0.26894142 * 0.98932340 = 0.11408212; 0 where s(beta h) = 0.9, beta h = log 9."""
    close(dpo.exo_loss(*PAIR, beta=0.5, label_smoothing=0.1), 0.11408212)
    close_to_zero = dpo.exo_loss(*PAIR, beta=math.log(9.0) / 2, label_smoothing=0.1)
    np.testing.assert_allclose(close_to_zero.loss, [0.0], atol=1e-6)


def test_rpo_by_hand():
    """Ratings 2 and 1: the policy's margin, 1, is the ratings': 0. Equal ratings:
    0.5 log(0.5 / 0.73105858) + 0.5 log(0.5 / 0.26894142) = 0.5 (-0.37988549 + 0.62011451) = 0.12011451."""
    close(dpo.rpo_loss(*PAIR, jnp.array([2.0]), jnp.array([1.0]), beta=0.5, eta=1.0), 0.0)
    close(dpo.rpo_loss(*PAIR, jnp.array([3.0]), jnp.array([3.0]), beta=0.5, eta=1.0), 0.12011451)


def test_rpo_gives_no_gradient_to_the_ratings():
    gradient = jax.grad(
        lambda rating: dpo.rpo_loss(*PAIR, rating, jnp.array([1.0]), beta=0.5, eta=1.0).loss.sum()
    )(jnp.array([4.0]))
    assert gradient == 0


def test_dpo_with_nll_by_hand():
    """0.31326169 + 0.2 * 6 / 4 = 0.61326169; with weight 2 twice that, over a count of 2."""
    loss = dpo.dpo_nll_loss(*PAIR, jnp.array([6.0]), jnp.array([4]), beta=0.5, alpha=0.2)
    close(loss, 0.61326169)
    assert loss.metrics["nll_loss"].sum == 1.5
    twice = dpo.dpo_nll_loss(
        *PAIR, jnp.array([6.0]), jnp.array([4]), beta=0.5, alpha=0.2, weights_B=jnp.array([2.0])
    )
    np.testing.assert_allclose(twice.loss, [1.22652338], rtol=1e-6)
    np.testing.assert_allclose(twice.metrics["loss"].sum / twice.metrics["loss"].count, 0.61326169, rtol=1e-6)


def test_apo_by_hand():
    """Zero: 1 - s(0.5) + s(-0.5) = 2 * 0.37754067 = 0.75508134. Down: s(0.5) + 1 - s(1) = 0.62245933 + 0.26894142 =
    0.89140075."""
    close(anchored.apo_zero_loss(*PAIR, beta=0.5), 0.75508134)
    close(anchored.apo_down_loss(*PAIR, beta=0.5), 0.89140075)


def test_nca_by_hand():
    """-log s(0.5) = 0.47407698, -log s(-0.5) = 0.97407698: 0.47407698 + 0.48703849 + 0.23703849 = 1.19815396."""
    close(anchored.nca_loss(*PAIR, beta=0.5), 1.19815396)


def test_bco_by_hand():
    """No shift: 2 * 0.47407698 = 0.94815396. delta = 1/4: -log s(0.25) - log s(0.75)."""
    close(anchored.bco_pair_loss(*PAIR, beta=0.5), 0.94815396)
    close(anchored.bco_loss(*PAIR, beta=0.5, delta=0.25), softplus(-0.25) + softplus(-0.75))


def test_sppo_by_hand():
    """beta = 1/4. Hard: (1 - 2)^2 + (-1 + 2)^2 = 2. P = 3/4, 1/2: (1 - 1)^2 + (-1 - 0)^2 = 1."""
    close(anchored.sppo_hard_loss(*PAIR, beta=0.25), 2.0)
    close(anchored.sppo_loss(*PAIR, jnp.array([0.75]), jnp.array([0.5]), beta=0.25), 1.0)


def stored_pairs() -> list[jax.Array]:
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return [jnp.array(TRL["pairs"][f"{name}_logps"]) for name in names]


def stored_lengths() -> list[jax.Array]:
    return [jnp.array(TRL["pairs"][f"{side}_lengths"]) for side in ("chosen", "rejected")]


TRL_LOSSES = {
    "dpo_loss": dpo.dpo_loss,
    "robust_dpo_loss": dpo.robust_dpo_loss,
    "ipo_mean_loss": dpo.ipo_mean_loss,
    "hinge_loss": dpo.hinge_loss,
    "normalized_dpo_loss": dpo.normalized_dpo_loss,
    "exo_loss": dpo.exo_loss,
    "apo_zero_loss": anchored.apo_zero_loss,
    "apo_down_loss": anchored.apo_down_loss,
    "nca_loss": anchored.nca_loss,
    "bco_pair_loss": anchored.bco_pair_loss,
    "sppo_hard_loss": anchored.sppo_hard_loss,
}


@pytest.mark.parametrize("name", sorted(TRL["dpo"]))
def test_equals_trl(name):
    """TRL's trainer on six pairs, in float64; the inputs are exact in float32."""
    want = TRL["dpo"][name]
    arguments = stored_pairs()
    if name in ("ipo_mean_loss", "normalized_dpo_loss"):
        arguments += stored_lengths()
    keywords = {"beta": want["beta"]}
    if want["label_smoothing"]:
        keywords["label_smoothing"] = want["label_smoothing"]
    loss = TRL_LOSSES[name](*arguments, **keywords)
    np.testing.assert_allclose(loss.loss_B, want["loss"], rtol=2e-6, atol=1e-7)
    assert loss.count == 6
    for metric, value in want["metrics"].items():
        if metric.startswith("rewards/") and name in ("ipo_mean_loss", "normalized_dpo_loss"):
            continue  # TRL logs beta a, these functions beta a / |y|
        np.testing.assert_allclose(loss.metrics[metric].sum / loss.count, value, rtol=2e-6)


def extra(*names: str) -> list[jax.Array]:
    return [jnp.array(PAPER["extra"][name]) for name in names]


PAPER_CASES = {
    "cdpo_loss": lambda a, v: dpo.cdpo_loss(*a, beta=v["beta"], label_smoothing=v["label_smoothing"]),
    "ipo_loss": lambda a, v: dpo.ipo_loss(*a, beta=v["beta"]),
    "rdpo_loss": lambda a, v: dpo.rdpo_loss(*a, *stored_lengths(), beta=v["beta"], alpha=v["alpha"]),
    "dpop_loss": lambda a, v: dpo.dpop_loss(*a, beta=v["beta"], lambda_=v["lambda"]),
    "tdpo1_loss": lambda a, v: dpo.tdpo1_loss(*a, *extra("chosen_kls", "rejected_kls"), beta=v["beta"]),
    "tdpo2_loss": lambda a, v: dpo.tdpo2_loss(
        *a, *extra("chosen_kls", "rejected_kls"), beta=v["beta"], alpha=v["alpha"]
    ),
    "rpo_loss": lambda a, v: dpo.rpo_loss(
        *a, *extra("chosen_ratings", "rejected_ratings"), beta=v["beta"], eta=v["eta"]
    ),
    "dpo_nll_loss": lambda a, v: dpo.dpo_nll_loss(
        *a, *extra("nlls", "nll_tokens"), beta=v["beta"], alpha=v["alpha"]
    ),
    "sppo_loss": lambda a, v: anchored.sppo_loss(
        *a, *extra("chosen_win_rates", "rejected_win_rates"), beta=v["beta"]
    ),
    "bco_loss": lambda a, v: anchored.bco_loss(*a, beta=v["beta"], delta=v["delta"]),
}


@pytest.mark.parametrize("name", sorted(PAPER_CASES))
def test_equals_the_papers_equation_in_float64(name):
    want = PAPER["pairs"][name]
    loss = PAPER_CASES[name](stored_pairs(), want)
    np.testing.assert_allclose(loss.loss_B, want["loss"], rtol=5e-6, atol=1e-6)


# As the authors' code is called in make_author_values.py; `kls` are those of the chosen and of the rejected answers.
AUTHOR_CASES = {
    "cdpo_loss": lambda a, kls: dpo.cdpo_loss(*a, beta=0.125, label_smoothing=0.25),
    "ipo_loss": lambda a, kls: dpo.ipo_loss(*a, beta=0.25),
    "tdpo1_loss": lambda a, kls: dpo.tdpo1_loss(*a, *kls, beta=0.125),
    "tdpo2_loss": lambda a, kls: dpo.tdpo2_loss(*a, *kls, beta=0.125, alpha=0.5),
    "rpo_loss": lambda a, kls: dpo.rpo_loss(
        *a, *extra("chosen_ratings", "rejected_ratings"), beta=0.125, eta=0.5
    ),
    "sppo_loss": lambda a, kls: anchored.sppo_loss(
        *a, *extra("chosen_win_rates", "rejected_win_rates"), beta=0.03125
    ),
    "bco_loss": lambda a, kls: anchored.bco_loss(*a, beta=0.125, delta=AUTHORS["bco_delta"]),
}


@pytest.mark.parametrize("name", sorted(AUTHOR_CASES))
def test_loss_and_gradients_equal_those_of_the_authors_code(name):
    """In float64 there. The authors of SPPO take half of their paper's equation."""
    want = AUTHORS["losses"][name]
    factor = 2.0 if name == "sppo_loss" else 1.0
    chosen, rejected, *reference = stored_pairs()

    def total(chosen, rejected, *kls):
        loss = AUTHOR_CASES[name]((chosen, rejected, *reference), kls)
        return loss.loss_B.sum(), loss.loss_B

    gradients, loss_B = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(
        chosen, rejected, *extra("chosen_kls", "rejected_kls")
    )
    np.testing.assert_allclose(loss_B, factor * np.array(want["loss"]), rtol=5e-6, atol=1e-6)
    names = ("policy_chosen_logps", "policy_rejected_logps", "chosen_kls", "rejected_kls")
    for key, gradient in zip(names, gradients, strict=True):
        expected = factor * np.array(want["gradients"].get(key, np.zeros(6)))
        np.testing.assert_allclose(gradient, expected, rtol=5e-6, atol=1e-7, err_msg=key)
