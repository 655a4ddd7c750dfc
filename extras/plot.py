"""Draw a run, or the scores that eval.py wrote (needs matplotlib).

    python -m extras.plot out/sft run.png              # losses (smoothed) and accuracy over the steps
    python -m extras.plot results.json scores.png      # bars of all methods; for documents over their length
    python -m extras.plot results.answers.json s.png   # right answers over how sure they are
"""

import json
import statistics
from pathlib import Path

from support import command, make_parser, read_json


def draw_run(ax, folder: Path) -> None:
    """The training loss, averaged over 2% of the steps, and what validation measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    width = max(1, len(rows) // 50)
    means = []
    for i in range(len(rows)):
        recent = losses[max(0, i + 1 - width) : i + 1]
        means.append(sum(recent) / len(recent))
    ax.plot(steps, means, label=f"loss (mean of {width} steps)" if width > 1 else "loss")
    for key in ("val_loss", "val_accuracy"):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            ax.plot(*zip(*points), "o-", label=key)
    ax.set(xlabel="step", ylim=(0, None))
    ax.legend(frameon=False)


def draw_lengths(ax, results: dict) -> None:
    """Scores over the length of documents."""
    for method, scores in results.items():
        points = sorted((int(name.split()[0]), score) for name, score in scores["per_task"].items())
        ax.plot(*zip(*points), "o-", label=method)
    ax.set(xscale="log", xlabel="lines of the document", ylabel="right answers", ylim=(-0.03, 1.12))
    ax.legend(frameon=False)


def draw_bars(ax, results: dict, split: str) -> None:
    """A bar for each method."""
    means = {method: scores["mean"] for method, scores in reversed(results.items())}
    colours = ["#2f6db5" if method == "net" else "#b8c4d6" for method in means]
    bars = ax.barh(list(means), list(means.values()), color=colours)
    ax.bar_label(bars, fmt="%.2f", padding=3)
    ax.set(xlim=(0, 1.12), xlabel=f"right answers on {split} tasks")


def draw_certainty(ax, answers: dict) -> None:
    """The share of right answers over how sure they are, in tenths; a dot is as large as its tenth."""
    ax.plot([0, 1], [0, 1], color="#b8c4d6")
    for method, rows in answers.items():
        sure, score, size = [], [], []
        for i in range(10):
            tenth = [row for row in rows if min(9, int(10 * row["sure"])) == i]
            if tenth:
                sure.append(statistics.fmean(row["sure"] for row in tenth))
                score.append(statistics.fmean(row["score"] for row in tenth))
                size.append(4 + 400 * len(tenth) / len(rows))
        ax.plot(sure, score, label=method)
        ax.scatter(sure, score, size)
    ax.set(xlabel="how sure", ylabel="right answers", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(frameon=False)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("source", type=Path, help="folder of a run, or file of eval.py --out")
    parser.add_argument("out", help="the picture to write, a PNG file")
    args = parser.parse_args()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    from matplotlib import pyplot

    if args.source.is_dir():
        figure, ax = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
        draw_run(ax, args.source)
    elif args.source.name.endswith(".answers.json"):
        figure, ax = pyplot.subplots(figsize=(4.5, 4), layout="constrained")
        draw_certainty(ax, read_json(args.source))
    else:
        content = read_json(args.source)
        results, split = content["results"], content["settings"]["split"]
        names = next(iter(results.values()))["per_task"]
        are_lengths = len(names) > 1 and all(name.endswith(" lines") for name in names)
        height = 3.6 if are_lengths else 0.8 + 0.34 * len(results)
        figure, ax = pyplot.subplots(figsize=(7, height), layout="constrained")
        if are_lengths:
            draw_lengths(ax, results)
        else:
            draw_bars(ax, results, split)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    command(main)
