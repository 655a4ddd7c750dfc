"""The scores of eval.py, {method: {task or length: share of right answers}}, as a table in markdown."""

import random
import statistics

from checkpoints import locate
from tasks import benchmarks

def interval(scores: list[float], n: int = 2000) -> str:
    """95% interval of the mean: bootstrap over the tasks."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(scores, k=len(scores))) for _ in range(n))
    return f"{means[n // 40]:.2f} to {means[-1 - n // 40]:.2f}"

def make_table(results: dict[str, dict[str, float]], args) -> str:
    """The scores in markdown, one line per method; for lengths and benchmarks one column each."""
    columns = []  # tasks, benchmarks or lengths
    for scores in results.values():
        columns += [name for name in scores if name not in columns]
    if args.lengths:
        lines = wide_table("tokens of the document", columns, results)
    elif set(columns) <= set(benchmarks.BENCHMARKS):
        with_published = benchmarks.beside_published(results, locate.preset_of(args.base_model))
        lines = wide_table("method", sorted(columns) + ["average"], with_published)
    else:
        title = f"right answers on {len(columns)} {args.split} tasks"
        lines = [["method", title, "95% interval", "worst task"]]
        for method, scores in results.items():
            values = list(scores.values())
            lines.append([method, f"{statistics.fmean(values):.3f}", interval(values), f"{min(values):.2f}"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

def wide_table(title: str, columns: list[str], results: dict[str, dict[str, float]]) -> list[list[str]]:
    """The cells of a table with one column per length or benchmark."""
    lines = [[title, *columns]]
    for method, scores in results.items():
        cells = [f"{scores[name]:.2f}" if name in scores else "" for name in columns]
        lines.append([method, *cells])
    return lines
