"""A reward model's report as files: JSON, Markdown tables, plots, and a line for every pair."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.evaluate.score_pairs import ScoredPairs
from posttrain_jax.losses.reward import disagreement

PICTURES = {
    "calibration": "Calibration: predicted probability and share that agrees",
    "scores": "Scores of chosen and rejected completions",
    "margins": "Accuracy by margin",
    "length": "Score by length",
}


def write_report(report: dict[str, Any], folder: str | Path) -> None:
    """Writes report.json, report.md which shows the plots calibration.png, scores.png, margins.png and length.png.

    Args:
      report: from `reward_report`.
      folder: made if it is not there; files of these names in it are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    (folder / "report.json").write_text(text + "\n", "utf-8", errors="replace")
    (folder / "report.md").write_text(report_text(report), "utf-8", errors="replace")
    panels = (_draw_calibration, _draw_histogram, _draw_margins, _draw_length)
    for name, panel in zip(PICTURES, panels, strict=True):
        _draw(folder / f"{name}.png", report, panel)


def write_rows(splits: Sequence[ScoredPairs], folder: str | Path) -> None:
    """Writes rows.jsonl, a line for every pair: the two scores, and of an ensemble how far its members are apart.

    `chosen_std` and `rejected_std` are the standard deviations of the members' scores (divided by E), `margin_std` of
    their margins, which is large where the members disagree about the pair itself.

    Args:
      splits: as for `reward_report`.
      folder: is there already; a rows.jsonl in it is replaced.
    """
    lines = []
    for pairs in splits:
        columns: dict[str, Sequence[Any]] = {
            "chosen_score": np.asarray(pairs.chosen_scores_N, np.float64).tolist(),
            "rejected_score": np.asarray(pairs.rejected_scores_N, np.float64).tolist(),
        }
        if pairs.rows_N is not None:
            columns = {"row": pairs.rows_N, **columns}
        if pairs.subsets_N is not None:
            columns["subset"] = pairs.subsets_N
        if pairs.member_chosen_scores_EN is not None and pairs.member_rejected_scores_EN is not None:
            chosen_EN, rejected_EN = pairs.member_chosen_scores_EN, pairs.member_rejected_scores_EN
            for name, scores_EN in (
                ("chosen_std", chosen_EN),
                ("rejected_std", rejected_EN),
                ("margin_std", chosen_EN - rejected_EN),
            ):
                columns[name] = np.asarray(disagreement(jnp.asarray(scores_EN)), np.float64).tolist()
        for values in zip(*columns.values(), strict=True):
            line = {"split": pairs.split, **dict(zip(columns, values, strict=True))}
            lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    (Path(folder) / "rows.jsonl").write_text("".join(lines), "utf-8")


def report_text(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    settings, splits = report["settings"], report["splits"]
    lines = ["# Reward model", ""]
    if report["about"]:
        lines += [*(f"- {_plain(name)}: {_plain(text)}" for name, text in report["about"].items()), ""]
    lines += _table(
        ("split", "pairs", "groups", "ties", "accuracy", "loss", "mean margin", "calibration error"),
        [
            (
                name,
                part["pairs"],
                part["groups"],
                part["ties"],
                _percent(part["accuracy"]),
                f"{part['loss']:.4f}",
                f"{part['mean_margin']:.4g}",
                f"{part['calibration']['expected_calibration_error']:.4f}",
            )
            for name, part in splits.items()
        ],
    )
    lines += [
        "Accuracy: share of pairs whose chosen completion scores higher; a tie is wrong. In brackets the 95 % interval "
        f"over groups (Wilson's; bootstrap with {settings['resamples']} resamples where a group is partly right or "
        "groups weigh differently). Loss: mean -log sigma(margin), with margins on the scale of training. Calibration "
        f"error: {settings['calibration_bins']} bins of equal width over [0, 1], every pair in both orders.",
        "",
        *(f"![{title}]({name}.png)" for name, title in PICTURES.items()),
        "",
    ]
    for name, part in splits.items():
        lines += _split_text(name, part)
    return "\n".join(lines)


def _split_text(name: str, part: dict[str, Any]) -> list[str]:
    lines = [f"## {_plain(name)}", ""]
    binned = {
        "label margin": part.get("by_label_margin"),
        "predicted margin": part["by_predicted_margin"],
        "disagreement (std of the members' margins)": part.get("disagreement", {}).get("by_tercile"),
    }
    for title, bins in binned.items():
        if bins:
            rows = [(f"{b['low']:.4g} to {b['high']:.4g}", b["pairs"], _percent(b["accuracy"])) for b in bins]
            lines += _table((title, "pairs", "accuracy"), rows)
    if "disagreement" in part:
        disagreement = part["disagreement"]
        each = ", ".join(f"{value:.1%}" for value in disagreement["member_accuracy"])
        lines += [
            f"{disagreement['members']} members with accuracies {each}; mean std of their margins "
            f"{disagreement['mean_std']:.4g}.",
            "",
        ]
    length = part["length"]
    lines += _table(
        (f"length ({length['unit']})", "Pearson", "Spearman"),
        [
            ("score, length", _number(length["pearson"]), _number(length["spearman"])),
            (
                "margin, difference of lengths",
                _number(length["pearson_within_pairs"]),
                _number(length["spearman_within_pairs"]),
            ),
        ],
    )
    lines += [
        f"The chosen answer is the longer one in {length['chosen_is_longer']:.1%} of the pairs; the longer one scores "
        f"higher in {length['longer_scores_higher']:.1%}.",
        "",
    ]
    if "person" in part:
        person = part["person"]
        lines += [
            f"A person drawn at random prefers what the model prefers in {_percent(person['agreement'])} of the pairs, "
            f"and what most people prefer in {person['most']:.1%}.",
            "",
        ]
    for title, column in (("raters", "agreement"), ("subsets", "accuracy")):
        if title in part:
            by_name = part[title]
            shares = [(name, v["pairs"], v["ties"], _percent(v[column])) for name, v in by_name.items()]
            lines += _table((title, "pairs", "ties", column), shares)
    if "sections" in part:
        lines += _table(("section", "score"), [(key, _percent(v)) for key, v in part["sections"].items()])
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    numbers = ["---", *["---:"] * (len(header) - 1)]
    return [
        *("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in (header, numbers, *rows)),
        "",
    ]


def _plain(cell: Any) -> str:
    """A text of the data's or the user's in a line of Markdown: neither HTML nor the end of a cell."""
    return html.escape(" ".join(str(cell).split()), quote=False).replace("|", "\\|")


def _percent(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['value']:.1%} ({estimate['low']:.1%} to {estimate['high']:.1%})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _draw(path: Path, report: dict[str, Any], panel: Callable[[Any, dict[str, Any]], None]) -> None:
    """One panel a split, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    splits = report["splits"]
    figure, axes = plt.subplots(
        1, len(splits), figsize=(4.2 * len(splits), 3.6), constrained_layout=True, squeeze=False
    )
    for axis, (name, part) in zip(axes[0], splits.items(), strict=True):
        panel(axis, part)
        axis.set_title(name, fontsize=10, parse_math=False)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_calibration(axis: Any, part: dict[str, Any]) -> None:
    calibration = part["calibration"]
    filled = [b for b in calibration["bins"] if b["predicted"] is not None]
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    axis.plot(
        [b["predicted"] for b in filled],
        [b["agreement"] for b in filled],
        marker="o",
        markersize=4,
        label=f"error {calibration['expected_calibration_error']:.3f}",
    )
    axis.set_xlabel("predicted: sigma(margin)", fontsize=9)
    axis.set_ylabel("share that agrees", fontsize=9)


def _draw_histogram(axis: Any, part: dict[str, Any]) -> None:
    histogram = part["histogram"]
    for name in ("chosen", "rejected"):
        axis.stairs(histogram[name], histogram["edges"], fill=True, alpha=0.5, label=name)
    axis.set_xlabel("score", fontsize=9)
    axis.set_ylabel("completions", fontsize=9)


def _draw_margins(axis: Any, part: dict[str, Any]) -> None:
    """Accuracy in the bins of both margins; the bins are numbered, for the two have their own scales."""
    for name, key in (("label margin", "by_label_margin"), ("predicted margin", "by_predicted_margin")):
        bins = part.get(key, [])
        if bins:
            values = np.asarray([[b["accuracy"][end] for end in ("value", "low", "high")] for b in bins])
            reach = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])
            places = np.arange(1, len(bins) + 1)
            axis.errorbar(places, values[:, 0], yerr=np.maximum(reach, 0), marker="o", capsize=3, label=name)
    axis.axhline(0.5, color="grey", linewidth=1, linestyle="--")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("bin of the margin, smallest first", fontsize=9)
    axis.set_ylabel("accuracy", fontsize=9)


def _draw_length(axis: Any, part: dict[str, Any]) -> None:
    length = part["length"]
    bins = length["by_length"]
    axis.errorbar(
        [b["mean_length"] for b in bins],
        [b["mean_score"] for b in bins],
        yerr=[b["std_score"] for b in bins],
        marker="o",
        capsize=3,
        label=f"Spearman {_number(length['spearman'])}",
    )
    axis.set_xlabel(f"length ({length['unit']})", fontsize=9)
    axis.set_ylabel("score: mean and standard deviation", fontsize=9)
