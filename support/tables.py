"""Scores as a table in markdown, answers in columns, pictures."""

import random
import re
import statistics

from support.files import UserError

Scores = dict[str, float]  # {task: share of right answers}


def interval(scores: list[float], n: int = 2000) -> str:
    """95% interval of the mean: bootstrap over the tasks."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(scores, k=len(scores))) for _ in range(n))
    return f"{means[n // 40]:.2f} to {means[-1 - n // 40]:.2f}"


def column_order(name: str) -> tuple:
    """By name, but "4 lines" before "16 lines", and the average last."""
    number = re.match(r"(\d+) ", name)
    return name == "average", int(number[1]) if number else 0, name


def make_table(results: dict[str, Scores], split: str) -> str:
    """The scores in markdown: a line for each method; few tasks have a column each."""
    columns = set()
    for scores in results.values():
        columns.update(scores)
    lines = []
    if len(columns) <= 11:  # ten benchmarks and their average
        columns = sorted(columns, key=column_order)
        lines.append(["method", *columns])
        for method, scores in results.items():
            lines.append([method, *(f"{scores[name]:.2f}" if name in scores else "" for name in columns)])
    else:
        title = f"right answers on {len(columns)} {split} tasks"
        lines.append(["method", title, "95% interval", "worst task"])
        for method, scores in results.items():
            values = list(scores.values())
            lines.append([method, f"{statistics.fmean(values):.3f}", interval(values), f"{min(values):.2f}"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show_answers(inputs: list[str], answers: dict[str, list[str]]) -> None:
    """Print the answers to each input, one below the other."""
    for i, question in enumerate(inputs):
        print(f"\n  {'input':12}  {question}")
        for label in answers:
            lines = answers[label][i].replace("\n", f"\n{'':16}")
            print(f"  {label:12}  {lines}")


def pyplot():
    """matplotlib.pyplot, without a screen. Raises UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
