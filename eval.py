"""Judge adapters: the share of right answers (exact matches), method by method, on seen and unseen tasks.

    python eval.py --split test                                     # what needs no further files
    python eval.py --split test --oracles DIR --mt_lora DIR --recon DIR [DIR ...] --out results.json --plot results.png
    python eval.py --doc --tasks facts --hypernet DIR               # Doc-to-LoRA, over the length of the document
    python eval.py --speed

The methods:

    base            the base model, the input alone in its prompt
    icl             three examples in the prompt
    prompt          the description in the prompt
    mt_lora         one LoRA trained on all tasks                    (--mt_lora DIR)
    oracle          a LoRA trained on the task itself                (--oracles DIR)
    t2l             the hypernetwork's adapter, from the task's own descriptions
    t2l_reworded    the same, from wordings that training never used (tiny world)
    t2l_shuffled    from another task's description
    t2l_random      from meaningless text
    recon           a hypernetwork trained by reconstruction         (--recon DIR)
"""

import argparse
import random
import re
import statistics
import string
import time
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

import data
import generate
import hypernet
import lora
import model
import train
from lora import UserError

TASKS, DOC, SPEED, FRESH = "scores on tasks", "--doc", "--speed", "--speed without --hypernet"
SERVES = {  # where flags have an effect, if not everywhere
    ("split", "n_tasks", "methods", "mt_lora", "oracles", "recon", "compare", "descriptions", "far", "per_task", "encoder", "prompt_with_definition", "seed"): (TASKS,),
    ("tasks", "n_examples", "chunk_len", "chunk_batch", "contains", "batch_size", "max_new_tokens", "out", "plot"): (TASKS, DOC),
    ("lengths",): (DOC,),
    ("size",): (FRESH,),
}
METHODS = ("base", "icl", "prompt", "mt_lora", "oracle", "t2l", "t2l_reworded", "t2l_shuffled", "t2l_random", "recon")


def lengths(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between."""
    return [lora.positive(n) for n in text.split(",")]


def parse_args() -> argparse.Namespace:
    """The flags, checked as far as that goes without a model."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", help="As for train.py. Default: tiny, with --doc facts.")
    p.add_argument("--split", default="test", choices=["train", "val", "test"])
    p.add_argument("--n_tasks", type=lora.positive, help="Use that many of the tasks.")
    p.add_argument("--n_examples", type=lora.positive, default=25, help="Test examples a task, the i-th with its i-th description; with --doc documents of a length.")
    p.add_argument("--methods", help="Comma-separated. Default: all that have what they need.")
    p.add_argument("--mt_lora", help="Adapter folder of train.py --mode lora --multi_task.")
    p.add_argument("--oracles", help="Folder of adapter folders, one a task, of train.py --mode lora.")
    p.add_argument("--recon", nargs="+", default=[], help="Folders of train.py --mode recon; rows after the first are named by folder.")
    p.add_argument("--compare", nargs="+", default=[], help="Further hypernetworks, in rows t2l/FOLDER.")
    p.add_argument("--descriptions", help='JSON file {"task": ["description", ...]} to use in place of the tasks\' own.')
    p.add_argument("--far", help="Tasks (comma-separated) to average apart from the others, being unlike those of training.")
    p.add_argument("--per_task", action="store_true", help="Print the scores of every task as well.")
    p.add_argument("--prompt_with_definition", action=argparse.BooleanOptionalAction, help="As for train.py, in all rows of the table. On where a hypernetwork was trained so.")
    p.add_argument("--doc", action="store_true", help="Doc-to-LoRA on documents of --tasks facts or needle, of growing length.")
    p.add_argument("--lengths", type=lengths, default=[4, 8, 16, 32, 64, 128, 256], help="With --doc: lengths of the documents, in lines.")
    p.add_argument("--contains", action="store_true", help="Count an answer that has a right one in it, in place of exact match: for base models that answer in sentences.")
    p.add_argument("--batch_size", type=lora.positive, default=256, help="Rows that are answered at once.")
    p.add_argument("--seed", type=int, default=0, help="Of meaningless descriptions.")
    p.add_argument("--out", help="Write settings and scores to this JSON file.")
    p.add_argument("--plot", help="Draw the scores as a picture (needs matplotlib).")
    p.add_argument("--speed", action="store_true", help="Measure training steps and adapter generation; no scores.")
    p.add_argument("--size", default="large", choices=hypernet.SIZES, help="Size of the hypernetwork that --speed measures.")
    generate.model_flags(p)
    args = p.parse_args()
    lora.refuse_idle(args, p, (SPEED if args.hypernet else FRESH) if args.speed else DOC if args.doc else TASKS, SERVES)
    args.tasks = args.tasks or ("facts" if args.doc else "tiny")
    args.far = args.far.split(",") if args.far else []
    if args.plot:
        if Path(args.plot).suffix != ".png" or Path(args.plot).is_dir():
            raise UserError(f"--plot {args.plot}: it takes the name of a .png file")
        pyplot()  # is there matplotlib?
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder; it takes the name of a file")
    return args


def chosen_methods(args, n_tasks: int) -> list[str]:
    """Those of --methods, or all that have what they need."""
    own_words = args.tasks == "tiny" and not args.descriptions
    given = dict(mt_lora=args.mt_lora, oracle=args.oracles, recon=args.recon, t2l_reworded=own_words, t2l_shuffled=n_tasks > 1)
    needs = dict(mt_lora="--mt_lora DIR", oracle="--oracles DIR", recon="--recon DIR", t2l_reworded="--tasks tiny, without --descriptions", t2l_shuffled="two tasks or more")
    methods = args.methods.split(",") if args.methods else [m for m in METHODS if given.get(m, True)]
    if unknown := set(methods) - set(METHODS):
        raise UserError(f"unknown method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    for method, need in needs.items():
        if method in methods and not given[method]:
            raise UserError(f"the method {method} needs {need}")
        if need.endswith(" DIR") and given[method] and method not in methods:
            raise UserError(f"{need} is for the method {method}, which is not among --methods")
    return methods


# ---------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------


def score(judge, tasks: list[data.Task], method: str, net=None) -> dict[str, float]:
    """The share of right answers of one method, task by task; where `net` is given, of its adapters. Rows of different tasks and
    adapters share a batch."""
    args, base, tokenizer = judge
    write = net and generate.writer(net, base, tokenizer, args)
    rows = []  # (task, description, what stands in the prompt before the question, question, right answers)
    for t, task in enumerate(tasks):
        other = tasks[(t + 1) % len(tasks)]
        words = {"t2l_reworded": task.reworded, "t2l_shuffled": other.descriptions, "t2l_random": noise(args.seed + t)}.get(method, task.descriptions)
        for i, example in enumerate(task.test[: args.n_examples]):
            own = task.descriptions[i % len(task.descriptions)]
            stated = own if method == "prompt" else task.definition or own if args.prompt_with_definition else ""
            rows.append((task, words[i % len(words)], stated, *example))
    rows.sort(key=lambda row: len(row[2]) + len(row[3]))  # rows of like length share a batch, so little is padding

    hits = {task.name: [] for task in tasks}
    for start in tqdm(range(0, len(rows), args.batch_size), desc=method, leave=False):
        chunk = rows[start : start + args.batch_size]
        prompts = []
        for task, _, stated, question, _ in chunk:
            examples = [(q, a[0]) for q, a in task.train if q != question][:3] if method == "icl" else []
            messages = model.prompt(tokenizer, question, stated, examples)
            prompts.append(model.render(tokenizer, messages))
        adapter, scaling = adapters_of(args, method, chunk, net, write)
        lora.set_adapter(base, adapter, scaling)
        room = args.max_new_tokens
        if not args.contains:  # longer ones are wrong anyway
            room = min(room, max(len(model.tokenize(tokenizer, right)) for row in chunk for right in row[4]) + 2)
        answers = model.answer(base, tokenizer, prompts, room)
        for (task, _, _, _, right), given in zip(chunk, answers):
            hits[task.name].append(any(r in given for r in right) if args.contains else given in right)
    return {name: statistics.fmean(h) for name, h in hits.items()}


@torch.no_grad()
def adapters_of(args, method: str, chunk: list, net, write) -> tuple[lora.Adapter | None, float]:
    """The adapters of a chunk of rows, one a row (or one for all), and their scaling."""
    if net is not None:
        distinct = list(dict.fromkeys(row[1] for row in chunk))
        return lora.select(write(distinct), [distinct.index(row[1]) for row in chunk]), net.config.scaling
    if method == "mt_lora":
        adapter, config = load_adapter(args.mt_lora, args.device)
        return adapter, config.scaling
    if method == "oracle":
        names = list(dict.fromkeys(row[0].name for row in chunk))
        adapters, config = lora.load_adapters([Path(args.oracles) / name for name in names], args.device)
        return lora.select(adapters, [names.index(row[0].name) for row in chunk]), config.scaling
    return None, lora.SCALING


load_adapter = cache(lora.load_adapter)


def noise(seed: int) -> list[str]:
    """Text without meaning: 8 sentences of random letters."""
    rng = random.Random(seed)
    return [" ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(12)) for _ in range(8)]


def evaluate(args) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """{row of the table: {task: score}}, {row: number of tasks that its hypernetwork was trained on}"""
    tasks = data.pick(data.load_tasks(args.tasks), args.split, args.n_tasks)
    if args.descriptions:
        words = lora.read_json(args.descriptions)
        tasks = [task for task in tasks if task.name in words]
        for task in tasks:
            task.descriptions = [words[task.name]] if isinstance(words[task.name], str) else words[task.name]
        if not tasks or not all(map(data.are_texts, (task.descriptions for task in tasks))):
            raise UserError(f"{args.descriptions} has no descriptions of {'some' if tasks else 'the'} {args.split} tasks")
    for task in tasks:
        if not task.test:
            raise UserError(f"the task {task.name} has no test part: the last fifth of the instances, so it takes five")
    if unknown := set(args.far) - {task.name for task in tasks}:
        raise UserError(f"--far: no such task here: {', '.join(sorted(unknown))}")
    if len(set(args.far)) == len(tasks):
        raise UserError("--far names all tasks; it is for some of them")
    args.methods = chosen_methods(args, len(tasks))
    # which hypernetwork makes the adapters of which row
    folders = {method: args.hypernet or hypernet.shipped(args.base_model or "tiny") for method in args.methods if method.startswith("t2l")}
    folders |= {f"t2l/{Path(folder).name}": folder for folder in args.compare}
    folders |= {"recon" if folder == args.recon[0] else f"recon/{Path(folder).name}": folder for folder in args.recon}
    for group in (args.compare, args.recon):
        if len({Path(folder).name for folder in group}) < len(group):
            raise UserError("--compare and --recon: the last parts of the folders' names have to differ")
    needed = dict.fromkeys([*folders.values(), *filter(None, [args.hypernet])])  # that one names the base model, even if no row is its own
    loaded = {folder: generate.load_hypernet(folder, args) for folder in needed}
    if args.chunk_len and not any(isinstance(net, hypernet.DocToLoRA) for net in loaded.values()):
        raise UserError("--chunk_len is for hypernetworks that read documents")
    nets = {row: loaded[folder] for row, folder in folders.items()}
    configs = [net.config for net in loaded.values()]
    if args.prompt_with_definition is None:
        args.prompt_with_definition = any(getattr(config, "prompt_with_definition", False) for config in configs)
    configs += [load_adapter(args.mt_lora, args.device)[1]] if "mt_lora" in args.methods else []
    configs += [lora.load_adapter(Path(args.oracles) / task.name)[1] for task in tasks] if "oracle" in args.methods else []
    base, tokenizer = generate.load_for(configs, args)
    documents = [task.descriptions[0] for task in tasks] if any(isinstance(net, hypernet.DocToLoRA) for net in loaded.values()) else []
    model.check_known(tokenizer, documents + [question for task in tasks for question, _ in task.test])
    results = {}
    for row in dict.fromkeys([*args.methods, *folders]):
        results[row] = score((args, base, tokenizer), tasks, row, nets.get(row))
        print(f"{row:24} {statistics.fmean(results[row].values()):.3f}", flush=True)
    if args.plot and isinstance(nets.get("t2l"), hypernet.TextToLoRA):
        everything = [task for split in data.load_tasks(args.tasks).values() for task in split]
        encode = generate.encoder_of(nets["t2l"], base, tokenizer, args)
        if len(everything) > 1:
            plot_adapters(str(Path(args.plot).with_suffix("")) + "_adapters.png", everything, generate.writer(nets["t2l"], base, tokenizer, args), encode)
    records = {row: Path(folder) / "train_args.json" for row, folder in folders.items() if row.split("/")[0] == "t2l"}
    records = {row: lora.read_json(file) for row, file in records.items() if file.exists()}  # published checkpoints have none
    trained_on = {row: r["trained_tasks"] for row, r in records.items() if r["size"] == next(iter(records.values()))["size"]}
    return results, {row: n for row, n in trained_on.items() if row == "t2l" or n != trained_on.get("t2l")}


def interval(scores: list[float], n: int = 2000) -> tuple[float, float]:
    """Where the mean lies in 95 of 100 draws of as many tasks, with repetition (bootstrap)."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(scores, k=len(scores))) for _ in range(n))
    return means[n // 40], means[-1 - n // 40]


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table in markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" if cells else "|" + "---|" * len(head) for cells in (head, [], *lines))


def table(results: dict[str, dict[str, float]], tasks: str, far: list[str]) -> str:
    """The scores, a line a method; tasks named in `far` are averaged apart from the others.

    Tasks differ more than methods do, so how far T2L is ahead of another method is drawn from the tasks' differences.
    """
    n, lines = len(next(iter(results.values()))), []
    ours = results.get("t2l") if len(results) > 1 else None
    for row, scores in results.items():
        parts = [statistics.fmean(s for name, s in scores.items() if (name in far) == apart) for apart in (False, True)] if far else []
        cells = [f"{statistics.fmean(scores.values()):.3f}", "{:.2f} to {:.2f}".format(*interval(list(scores.values()))), *(f"{part:.3f}" for part in parts)]
        if ours:
            ahead = "{:+.2f} to {:+.2f}".format(*interval([ours[name] - s for name, s in scores.items()]))
            cells.append("" if row == "t2l" else ahead)
        lines.append([row, *cells, f"{min(scores.values()):.2f}", str(sum(s >= 0.9 for s in scores.values()))])
    more = (["near", "far"] if far else []) + (["T2L is ahead by (95%)"] if ours else [])
    return markdown(["method", f"right answers on {n} {tasks}", "95% interval", *more, "worst task", "tasks at 0.9 or more"], lines)


def task_table(results: dict[str, dict[str, float]]) -> str:
    """All scores, a line a task."""
    return markdown(["task", *results], [[name, *(f"{scores[name]:.2f}" for scores in results.values())] for name in next(iter(results.values()))])


def document_table(results: dict[str, dict[str, float]]) -> str:
    """The scores over the lengths of the documents."""
    lengths = list(results["d2l"])
    return markdown(["tokens of the document", *lengths], [[row, *(f"{scores[n]:.2f}" if n in scores else "" for n in lengths)] for row, scores in results.items()])


def cost_table(measured: dict[str, tuple[str, float]]) -> str:
    """What was measured."""
    return markdown(["what", "measured", "ratio"], [[what, value, f"{ratio:.2f}"] for what, (value, ratio) in measured.items()])


# ---------------------------------------------------------------------------------------------------------
# Documents: what the length of the document does to accuracy, and what answering costs
# ---------------------------------------------------------------------------------------------------------

READERS = {"base": "base", "in_context": "prompt", "d2l": "t2l", "d2l_shuffled": "t2l_shuffled"}  # row of the table: method


def evaluate_documents(args) -> tuple[dict[str, dict[str, float]], dict[str, tuple[str, float]]]:
    """{row of the table: {tokens of a document: score}}, and what answering costs, {what: (value, ratio)}.

    The document in the prompt (`in_context`) goes as far as the base model's context window, and so do the costs.
    """
    if args.tasks not in data.DOCUMENTS:
        raise UserError(f"--doc: --tasks is one of {', '.join(data.DOCUMENTS)}; for a folder of documents leave --doc out")
    if args.n_examples < 2:
        raise UserError("--doc takes --n_examples 2 or more: d2l_shuffled answers from another document")
    net = generate.load_hypernet(args.hypernet or hypernet.shipped(args.base_model or "tiny", "d2l"), args)
    if not isinstance(net, hypernet.DocToLoRA):
        raise UserError("--doc: this hypernetwork reads descriptions, not documents")
    base, tokenizer = generate.load_for([net.config], args)
    write, window = generate.writer(net, base, tokenizer, args), base.config.get_text_config().max_position_embeddings
    results, fitting = {row: {} for row in READERS}, None
    for n_lines in args.lengths:
        tasks = data.documents(args.tasks, n_lines, n_lines, args.n_examples)
        model.check_known(tokenizer, [text for task in tasks for text in (task.descriptions[0], task.test[0][0])])
        n_tokens = max(len(model.tokenize(tokenizer, task.descriptions[0])) for task in tasks)
        length, fits = f"{n_tokens:,}", n_tokens + 64 <= window  # the question and the answer have to fit, too
        fitting = tasks[0] if fits else fitting
        for row, method in READERS.items():
            if fits or row != "in_context":
                scores = score((args, base, tokenizer), tasks, method, net if "t2l" in method else None)
                results[row][length] = statistics.fmean(scores.values())
        print(f"{n_lines} lines, {length} tokens:", *(f"{row} {s[length]:.2f}" for row, s in results.items() if length in s), flush=True)
    return results, document_costs(args, base, tokenizer, net, write, fitting) if fitting else {}


def document_costs(args, base, tokenizer, net, write, task: data.Task) -> dict[str, tuple[str, float]]:
    """Answering a question about a document with it in the prompt, and from the weights. {what: (value, ratio)}"""
    document, question = task.descriptions[0], task.test[0][0]
    with torch.no_grad():
        adapter = write([document])
    render = lambda stated: [model.render(tokenizer, model.prompt(tokenizer, question, stated))]

    def answer(stated: str, adapter: lora.Adapter | None) -> None:
        lora.set_adapter(base, adapter, net.config.scaling)
        model.answer(base, tokenizer, render(stated), 8)

    ways = [lambda: answer(document, None), lambda: answer("", adapter)]
    (context_mib, context_s), (weights_mib, weights_s) = zip([peak_memory(way, args.device) for way in ways], timed(*ways, repeat=7))
    with torch.no_grad():
        (read_s,) = timed(lambda: write([document]), repeat=7)
    return {
        f"answer with a document of {len(model.tokenize(tokenizer, document)):,} tokens in the prompt": (f"{context_s * 1e3:.1f} ms", 1),
        f"answer from the weights (rank {max(A.shape[-2] for A, _ in adapter.values())})": (f"{weights_s * 1e3:.1f} ms", weights_s / context_s),
        "reading the document once": (f"{read_s * 1e3:.1f} ms", read_s / context_s),
        "peak memory of answering with it in the prompt": (f"{context_mib:.0f} MiB", 1),
        "peak memory of answering from the weights": (f"{weights_mib:.0f} MiB", weights_mib / context_mib),
    }


# ---------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------


def pyplot():
    """matplotlib, without a window."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(fig, path: str) -> None:
    """Write a picture, its folder included."""
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def plot(path: str, results: dict[str, dict[str, float]], trained_on: dict[str, int], split: str) -> None:
    """Bars of all rows; beside them, if hypernetworks of several numbers of training tasks are among them, the curve."""
    plt = pyplot()
    means = {row: statistics.fmean(scores.values()) for row, scores in results.items()}
    curve = sorted((n, means[row]) for row, n in trained_on.items())
    curved = len(curve) > 1
    bars = {row: mean for row, mean in reversed(means.items()) if not curved or row not in trained_on or row == "t2l"}  # from below
    fig, axes = plt.subplots(1, 1 + curved, figsize=(6 + 5 * curved, 0.8 + 0.34 * len(bars)), squeeze=False, layout="constrained")
    ax = axes[0][0]
    drawn = ax.barh(list(bars), list(bars.values()), color=["#b8c4d6" if row != "t2l" else "#2f6db5" for row in bars])
    ax.bar_label(drawn, fmt="%.2f", padding=3)
    ax.set(xlim=(0, 1.12), xlabel=f"right answers, {len(next(iter(results.values())))} {split} tasks")
    if curved:
        ax = axes[0][1]
        ax.plot(*zip(*curve), "o-", color="#2f6db5")
        for n, mean in curve:
            ax.annotate(f"{mean:.2f}", (n, mean), textcoords="offset points", xytext=(0, 7), ha="center")
        ax.set(xscale="log", xlabel="training tasks of the hypernetwork", ylabel=f"right answers, {split} tasks", ylim=(-0.03, 1.1))
        ax.set_xticks([n for n, _ in curve], [str(n) for n, _ in curve])
        ax.minorticks_off()
    save_figure(fig, path)


@torch.no_grad()
def plot_adapters(path: str, tasks: list[data.Task], write, encode) -> None:
    """A look inside: the adapters of all tasks in their two main directions, and how alike two adapters are against how
    alike their descriptions are. Families are the tiny world's layouts, or what stands before _ in the tasks' names."""
    plt = pyplot()
    flat = torch.cat([torch.cat([x.flatten(1).cpu() for pair in write([task.descriptions[0]]).values() for x in pair], 1) for task in tasks])  # [tasks, numbers]
    flat = flat - flat.mean(0)
    where = flat @ torch.pca_lowrank(flat, q=2, niter=4)[2]  # [tasks, 2]
    families = [task.name.split("-")[-1] if "-" in task.name else task.name.split("_")[0] for task in tasks]
    common = sorted(set(families), key=lambda family: (-families.count(family), family))[:8]
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for k, family in enumerate([*common, "others"]):
        own = [i for i, f in enumerate(families) if f == family or (family == "others" and f not in common)]
        if own:
            left.scatter(*where[own].T, s=14, color="#c9c9c9" if family == "others" else plt.cm.tab10(k), label=f"{family} ({len(own)})")
    left.set(xlabel="first principal component", ylabel="second", title="adapters of all tasks")
    left.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    i, j = torch.triu_indices(len(tasks), len(tasks), 1)
    chosen = torch.randperm(len(i), generator=torch.Generator().manual_seed(0))[:5000]
    alike = []
    for x in (encode([task.descriptions[0] for task in tasks]).cpu(), flat):
        x = torch.nn.functional.normalize(x, dim=-1)
        alike.append((x @ x.T)[i, j][chosen])
    right.scatter(*alike, s=3, alpha=0.3, color="#2f6db5", linewidths=0)
    right.set(xlabel="cosine of two descriptions", ylabel="cosine of their adapters, less the mean adapter")
    right.set_title(f"{len(chosen):,} pairs of tasks, correlation {torch.corrcoef(torch.stack(alike))[0, 1]:.2f}")
    save_figure(fig, path)


def plot_documents(path: str, results: dict[str, dict[str, float]]) -> None:
    """Accuracy over the length of the document."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    colors = {"base": "#c9c9c9", "in_context": "#d08a3c", "d2l": "#2f6db5", "d2l_shuffled": "#9db7d5"}
    for row, scores in results.items():  # the base model's line is a wide one, to be seen where another lies on it
        ax.plot([int(n.replace(",", "")) for n in scores], list(scores.values()), "o-", color=colors[row], label=row.replace("_", " "), lw=5 if row == "base" else 1.5)
    ax.set(xscale="log", xlabel="tokens of the document", ylabel="right answers", ylim=(-0.03, 1.12))
    ax.set_xticks([int(n.replace(",", "")) for n in results["d2l"]], list(results["d2l"]))
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    save_figure(fig, path)


# ---------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------


def timed(*actions, repeat: int = 15) -> list[float]:
    """Median seconds of each action, taken in turns so that all see the same machine."""
    seconds = [[] for _ in actions]
    for _ in range(repeat + 2):
        for action, taken in zip(actions, seconds):
            started = time.perf_counter()
            action()
            for gpu in range(torch.cuda.device_count()):
                torch.cuda.synchronize(gpu)
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken[2:]) for taken in seconds]


def peak_memory(action, device: str) -> float:
    """MiB at most while `action` runs: of the GPU, or of this process, which only Linux tells."""
    if torch.device(device).type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    action()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def training_speed(base, make_net, n: int, length: int, target: int, device: str) -> dict[str, tuple[str, float]]:
    """A training step on n rows of `length` tokens, `target` of them answer, against a bare forward and backward of the frozen base:
    every row has the adapter of a description of its own, or 8 share one. {what: (value, ratio)}"""
    input_ids = torch.randint(5, base.config.get_text_config().vocab_size, (n, length), device=device)
    labels = input_ids.masked_fill(torch.arange(length, device=device) < length - target, -100)

    def bare() -> None:
        """Forward, and backward as far as the embeddings."""
        lora.set_adapter(base, None)
        watch = base.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
        train.answer_loss(base, input_ids, labels).backward()
        watch.remove()

    bare_mib = peak_memory(bare, device)
    net = make_net().train()
    lora.inject(base, list(net.config.paths), net.config.dropout).train()
    embeddings = torch.randn(n, net.config.task_emb_size, device=device)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-9, fused=True)

    def step(descriptions: int) -> None:
        """What train.py does in a step of --mode sft, once the batch is drawn."""
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
            adapter = net(embeddings[:descriptions])
            lora.set_adapter(base, {name: (A.to(base.dtype), B.to(base.dtype)) for name, (A, B) in adapter.items()}, net.config.scaling)
            loss = train.answer_loss(base, input_ids, labels) + 1e-3 * train.weight_loss(adapter, torch.square)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    step_mib = peak_memory(lambda: step(n), device)
    bare_s, own_s, shared_s = timed(bare, lambda: step(n), lambda: step(n // 8))
    return {
        f"frozen base, forward and backward of {n} rows of {length} tokens": (f"{bare_s * 1e3:.1f} ms", 1),
        "training step of the hypernetwork on them, a description for each row": (f"{own_s * 1e3:.1f} ms", own_s / bare_s),
        "the same, a description for 8 rows": (f"{shared_s * 1e3:.1f} ms", shared_s / bare_s),
        "peak memory of the first": (f"{bare_mib:.0f} MiB", 1),
        "peak memory of the second": (f"{step_mib:.0f} MiB", step_mib / bare_mib),
    }


@torch.no_grad()
def generation_speed(net: hypernet.TextToLoRA, device: str) -> dict[str, tuple[str, float]]:
    """Writing 1 and 64 adapters, against reading the weights once. {what: (value, ratio)}"""
    embeddings = torch.randn(64, net.config.task_emb_size, device=device)
    read_s, one_s, many_s = timed(lambda: [p.sum() for p in net.parameters()], lambda: net(embeddings[:1]), lambda: net(embeddings), repeat=7)
    return {
        "reading the hypernetwork's weights once": (f"{read_s * 1e3:.2f} ms", 1),
        "one adapter": (f"{one_s * 1e3:.2f} ms", one_s / read_s),
        "64 adapters in one call, each": (f"{many_s / 64 * 1e3:.2f} ms", many_s / 64 / read_s),
    }


def speed(args) -> None:
    """Print the speed of training and of generation, for the hypernetwork of --hypernet, or a fresh one of the paper's width and of --size for --base_model.

    Of the paper's base models the shapes are enough to measure generation, where the model itself cannot be had.
    """
    net, measured = args.hypernet and generate.load_hypernet(args.hypernet, args), {}
    if isinstance(net, hypernet.DocToLoRA):
        raise UserError("--speed is for hypernetworks that read descriptions; --doc measures what Doc-to-LoRA costs")
    name = args.base_model or (net.config.base_model if net else "tiny")
    short = model.preset_name(name)
    try:
        base, _ = model.load_base(name, args.device, args.dtype and getattr(torch, args.dtype))
        config = None if net else lora.config_for(base, ["q_proj", "v_proj"], name)
        fresh = lambda: hypernet.TextToLoRA(hypernet.HypernetConfig(**vars(config), size=args.size)).to(args.device)
    except UserError as e:
        if short not in hypernet.PAPER_SHAPES:
            raise
        print(f"no training step: {e}\n")
        base, fresh = None, lambda: hypernet.paper_net(short, args.size).to(args.device)
    make_net = fresh if net is None else lambda: net
    if base is not None:
        measured |= training_speed(base, make_net, *((128, 14, 5) if short == "tiny" else (8, 128, 16)), args.device)
    measured |= generation_speed(make_net().eval(), args.device)
    print(f"{name}, {net.config.size if net else args.size}, on {args.device} with {torch.get_num_threads()} threads\n\n{cost_table(measured)}")


def main() -> None:
    args = parse_args()
    if args.speed:
        return speed(args)
    if args.doc:
        results, costs = evaluate_documents(args)
        print("\n" + document_table(results), cost_table(costs), sep="\n\n")
    else:
        results, trained_on = evaluate(args)
        print("\n" + table(results, f"{args.split} tasks of {args.tasks}", args.far) + ("\n\n" + task_table(results) if args.per_task else ""))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        scores = {row: {"mean": statistics.fmean(s.values()), "per_task": s} for row, s in results.items()}
        lora.write_json(Path(args.out), {"settings": vars(args), "results": scores} | ({"costs": costs} if args.doc else {}))
    if args.plot and args.doc:
        plot_documents(args.plot, results)
    elif args.plot:
        plot(args.plot, results, trained_on, args.split)


if __name__ == "__main__":
    lora.run(main)
