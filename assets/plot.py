"""The picture of `python eval.py --plot FILE.png`."""

import statistics
from pathlib import Path

from lora import UserError

def plot(path: str, results: dict[str, dict[str, float]], args) -> None:
    """Bars of all methods; for lengths lines over the length."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 3.6 if args.lengths else 0.8 + 0.34 * len(results)
    fig, ax = plt.subplots(figsize=(7, height), layout="constrained")
    if args.lengths:
        for method, scores in results.items():
            lengths = [int(n.replace(",", "")) for n in scores]
            ax.plot(lengths, list(scores.values()), "o-", label=method)
        ax.set(xscale="log", xlabel="tokens of the document", ylabel="right answers", ylim=(-0.03, 1.12))
        ax.legend(frameon=False)
    else:
        means = {method: statistics.fmean(scores.values()) for method, scores in reversed(results.items())}
        colors = ["#2f6db5" if method == "t2l" else "#b8c4d6" for method in means]
        bars = ax.barh(list(means), list(means.values()), color=colors)
        ax.bar_label(bars, fmt="%.2f", padding=3)
        ax.set(xlim=(0, 1.12), xlabel=f"right answers on {args.split} tasks")
    ax.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
