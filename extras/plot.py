"""Draw the scores that eval.py wrote: python -m extras.plot results.json out.png   (needs matplotlib)

Bars of all methods; for documents lines over their length.
"""

from pathlib import Path

from support import flags
from support.files import UserError, check_name, command, read_object
from support.tables import pyplot


def main() -> None:
    parser = flags.Parser(__doc__)
    parser.add_argument("results", type=Path, help="file of eval.py --out")
    parser.add_argument("out", type=Path, help="the picture to write, a PNG file")
    args = parser.parse_args()
    check_name(args.out, ".png")
    content = read_object(args.results)
    if not content.get("results"):
        raise UserError(f"{args.results} holds no scores: eval.py --out writes them")
    results, split = content["results"], content["settings"]["split"]
    names = next(iter(results.values()))["per_task"]
    are_lengths = len(names) > 1 and all(name.endswith(" lines") for name in names)
    height = 3.6 if are_lengths else 0.8 + 0.34 * len(results)
    fig, ax = pyplot().subplots(figsize=(7, height), layout="constrained")
    if are_lengths:
        for method, scores in results.items():
            points = sorted((int(name.split()[0]), score) for name, score in scores["per_task"].items())
            ax.plot([n for n, _ in points], [score for _, score in points], "o-", label=method)
        ax.set(xscale="log", xlabel="lines of the document", ylabel="right answers", ylim=(-0.03, 1.12))
        ax.legend(frameon=False)
    else:
        means = {method: scores["mean"] for method, scores in reversed(results.items())}
        colours = ["#2f6db5" if method == "t2l" else "#b8c4d6" for method in means]
        bars = ax.barh(list(means), list(means.values()), color=colours)
        ax.bar_label(bars, fmt="%.2f", padding=3)
        ax.set(xlim=(0, 1.12), xlabel=f"right answers on {split} tasks")
    ax.spines[["top", "right"]].set_visible(False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=150)


if __name__ == "__main__":
    command(main)
