"""Judge adapters: the share of right answers, method by method, on seen and unseen tasks.

    python eval.py                                                  # the shipped hypernetwork on unseen tasks
    python eval.py --oracles DIR --mt_lora DIR --recon DIR --out results.json --plot results.png
    python eval.py --tasks facts --hypernet checkpoints/tiny/d2l --lengths 4,16,64      # Doc-to-LoRA
    python eval.py --tasks benchmarks --base_model gemma-2-2b --hypernet DIR            # the paper's table

The methods:

    base            the base model, the input alone in its prompt
    icl             three examples in the prompt
    prompt          the description (or the document) in the prompt
    mt_lora         one LoRA trained on all tasks                                  (--mt_lora DIR)
    oracle          a LoRA trained on the task itself                              (--oracles DIR)
    t2l             the hypernetwork's adapter, from the task's own descriptions (or the document)
    t2l_reworded    from wordings that training never used                         (tiny world)
    t2l_shuffled    from another task's description
    t2l_random      from meaningless text
    recon           a hypernetwork trained by reconstruction                       (--recon DIR)
"""

import argparse
import os
import random
import re
import signal
import statistics
import string
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

import data
import generate
import lora
import model
from lora import UserError

METHODS = "base icl prompt mt_lora oracle t2l t2l_reworded t2l_shuffled t2l_random recon".split()
Scores = dict[str, dict[str, float]]  # {row of the table: {task, or length of document: right answers}}

def parse_args() -> argparse.Namespace:
    """The flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=lora.Help)
    p.add_argument("--tasks", default="tiny", help="As for train.py; benchmarks, or some of them.")
    p.add_argument("--split", default="test", choices=["train", "val", "test"], help="Which of the tasks.")
    p.add_argument("--n_tasks", type=int, help="Use that many of them; by default all.")
    p.add_argument("--n_examples", type=int, help="Per task or length: by default 25, of benchmarks all.")
    p.add_argument("--methods", help="Comma-separated; by default all that have what they need.")
    p.add_argument("--mt_lora", help="Adapter folder of train.py --mode lora --multi_task.")
    p.add_argument("--oracles", help="Folder of adapter folders, one per task, of train.py --mode lora.")
    p.add_argument("--recon", help="Folder of train.py --mode recon.")
    p.add_argument("--compare", nargs="+", default=[], help="Further hypernetworks, in rows t2l/FOLDER.")
    p.add_argument("--descriptions", help='JSON file {"task": ["description", ...]} to use instead.')
    p.add_argument("--lengths", help="Of --tasks facts or needle: score documents of, say, 4,16,64 lines.")
    p.add_argument("--contains", action="store_true", help="Right is what contains a right answer.")
    p.add_argument("--run_code", action="store_true", help="Run code that the model writes: no sandbox!")
    p.add_argument("--batch_size", type=int, default=256, help="Rows that are answered at once.")
    p.add_argument("--out", help="Write settings and scores to this JSON file.")
    p.add_argument("--plot", help="Draw the scores into this PNG file (needs matplotlib).")
    generate.model_flags(p)
    return p.parse_args()

def chosen_methods(args, tasks: list[data.Task]) -> list[str]:
    """Those of --methods, or all that have what they need."""
    have = dict(mt_lora=args.mt_lora, oracle=args.oracles, recon=args.recon)
    have |= dict(t2l_reworded=all(task.reworded for task in tasks), t2l_shuffled=len(tasks) > 1)
    methods = args.methods.split(",") if args.methods else [m for m in METHODS if have.get(m, True)]
    for method in methods:
        if method not in METHODS:
            raise UserError(f"unknown method {method}; there are {', '.join(METHODS)}")
        if not have.get(method, True):
            raise UserError(f"the method {method} lacks what it needs (see eval.py --help)")
    return methods

# -------------------- Is it right? --------------------

ROOM = {"first": 8, "truth": 8, "number": 256, "code": 512}  # tokens of an answer, by its kind

def is_right(kind: str, answer: str, right: list[str]) -> bool:
    """Score an answer. "first": by its first character; "truth": it says true or yes, or false or no;
    "number": by its last number; "code": its tests (right[0]) pass, with the given head (right[1])."""
    if kind == "code":
        return passes(right[1] + answer.split("```")[0] + "\n" + right[0])
    if kind == "number":
        numbers = [n.replace(",", "").rstrip(".") for n in re.findall(r"-?\d[\d,]*\.?\d*", answer)]
        return bool(numbers) and float(numbers[-1]) == float(right[0].replace(",", ""))
    if kind == "truth":
        said = re.search(r"\b(true|yes|false|no)\b", answer.lower())
        return bool(said) and (said[1] in ("true", "yes")) == (right[0] == "true")
    if kind == "first":
        return answer.strip()[:1].casefold() == right[0][:1].casefold()
    return any(r in answer for r in right) if kind == "contains" else answer in right

RUNNER = """import os, shutil, subprocess
for name in ("fork", "forkpty", "posix_spawn", "kill", "killpg", "system", "setsid", "chmod", "rmdir"):
    setattr(os, name, None)
subprocess.Popen = shutil.rmtree = None
exec(compile(open("program.py").read(), "program.py", "exec"), {"__name__": "__main__"})
open(TOKEN, "w")
"""

def passes(program: str, seconds: int = 10) -> bool:
    """Whether a program runs to its end, in a process with limited time and memory, in an empty folder,
    without input and environment. This is no sandbox against hostile code."""
    import resource  # not on Windows

    def limit() -> None:
        limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: 2**31, resource.RLIMIT_FSIZE: 2**20}
        for what, most in (limits | {resource.RLIMIT_NPROC: 8, resource.RLIMIT_CORE: 0}).items():
            resource.setrlimit(what, (most, most))

    token = random.SystemRandom().randbytes(16).hex()  # a program that exits early does not write this file
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8")
        command = [sys.executable, "-I", "-c", RUNNER.replace("TOKEN", repr(token))]
        quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        run = subprocess.Popen(command, cwd=folder, env={}, preexec_fn=limit, start_new_session=True, **quiet)
        with suppress(subprocess.TimeoutExpired):
            run.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # with what it has started
        run.wait()
        return (Path(folder) / token).exists()

# -------------------- Scores --------------------

def noise(seed: int) -> list[str]:
    """Text without meaning: 8 sentences of random letters."""
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
    return [" ".join(word() for _ in range(12)) for _ in range(8)]

def make_questions(tasks: list[data.Task], method: str, args) -> list[dict]:
    """All test examples: the text for the adapter, the parts of the prompt, the right answers."""
    rows = []
    for t, task in enumerate(tasks):
        texts = task.descriptions
        if method == "t2l_reworded":
            texts = task.reworded
        elif method == "t2l_shuffled":
            texts = tasks[(t + 1) % len(tasks)].descriptions
        elif method == "t2l_random":
            texts = noise(t)
        n = args.n_examples or (25 if task.kind == "equal" else None)
        for i, (question, right) in enumerate(task.test[:n]):
            own, before, shots = task.descriptions[i % len(task.descriptions)], "", []
            if method == "prompt":
                before = own
            elif args.instruction and task.kind == "equal":  # the inputs of benchmarks say what to do
                before = (task.definition or own) + model.SUFFIX
            if method == "icl":
                shots = [(q, answers[0]) for q, answers in task.train if q != question][:3]
            row = dict(task=task, before=before, shots=shots, question=question, right=right)
            one = task.kind == "equal" or not method.startswith(("t2l", "recon"))  # else the mean over three
            rows += [row | {"text": text} for text in ([texts[i % len(texts)]] if one else texts[:3])]
    length = lambda row: len(row["before"]) + len(row["question"])
    return sorted(rows, key=lambda row: (row["task"].kind, length(row)))  # like lengths together

def score(tasks: list[data.Task], method: str, adapters_of, base, tokenizer, args) -> dict[str, float]:
    """{task: share of right answers}. adapters_of(rows): one adapter per row, or None, and the scaling."""
    hits, batches = {task.name: [] for task in tasks}, []
    for _, group in groupby(make_questions(tasks, method, args), key=lambda row: row["task"].kind):
        rows = list(group)
        batches += [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    for batch in tqdm(batches, desc=method, leave=False):
        kind = batch[0]["task"].kind
        prompts = []
        for row in batch:
            chat = model.prompt(tokenizer, row["question"], row["before"], row["shots"])
            start = row["task"].start + (row["right"][1] if kind == "code" else "")
            prompts.append(model.render(tokenizer, chat) + start)
        lora.set_adapter(base, *adapters_of(batch))
        room = ROOM.get(kind, args.max_new_tokens)
        if kind == "equal" and not args.contains:  # longer than the right answers is wrong anyway
            right = [answer for row in batch for answer in row["right"]]
            room = min(room, max(len(model.tokenize(tokenizer, answer)) for answer in right) + 2)
        answers = model.answer(base, tokenizer, prompts, room, strip=kind != "code")
        for row, answer in zip(batch, answers):
            how = "contains" if args.contains and kind == "equal" else kind
            hits[row["task"].name].append(is_right(how, answer, row["right"]))
    return {name: statistics.fmean(hit) for name, hit in hits.items()}

def written_by(net: torch.nn.Module, base, tokenizer, args):
    """The adapters of rows from a hypernetwork: each text is read once."""
    write = generate.writer(net, base, tokenizer, args)

    def adapters_of(rows: list[dict]):
        texts = list(dict.fromkeys(row["text"] for row in rows))
        index = [texts.index(row["text"]) for row in rows]
        return lora.select(write(texts), index), net.config.scaling

    return adapters_of

def read_from(folders: dict[str, Path]):
    """The adapters of rows from {task: adapter folder}, and the config of one of them."""
    names = list(folders)
    adapters, config = lora.load_adapters([folders[name] for name in names], generate.DEVICE)
    index = lambda rows: [names.index(row["task"].name) for row in rows]
    return lambda rows: (lora.select(adapters, index(rows)), config.scaling), config

def no_adapters(rows: list[dict]):
    """For the base model as it is."""
    return None, None

def chosen_tasks(args) -> list[data.Task]:
    """The tasks of --tasks and --split, with the descriptions of --descriptions."""
    tasks = data.pick(data.load_tasks(args.tasks), args.split, args.n_tasks)
    if not args.run_code and any(task.kind == "code" for task in tasks):
        tasks = [task for task in tasks if task.kind != "code"]
        print("without --run_code there are no scores for humaneval and mbpp")
    if args.descriptions:
        texts = lora.read(args.descriptions)
        tasks = [task for task in tasks if task.name in texts]
        if not tasks:
            raise UserError(f"{args.descriptions} has no descriptions of the {args.split} tasks")
        for task in tasks:
            task.descriptions, task.reworded = texts[task.name], []
    for task in tasks:
        if not task.test:
            raise UserError(f"the task {task.name} has no test part: that is the last fifth of its instances")
        if not all(answers for _, answers in task.test):
            raise UserError(f"{task.name} cannot be scored: a question of it has no answer")
    return tasks

def evaluate(args) -> Scores:
    """The scores of all rows of the table."""
    lengths = [int(n) for n in args.lengths.split(",")] if args.lengths else []
    if lengths and args.tasks not in data.DOCUMENTS:
        raise UserError(f"--lengths goes with --tasks {' or '.join(data.DOCUMENTS)}")
    tasks = data.documents(args.tasks, 1, 1, 2) if lengths else chosen_tasks(args)  # or two, to choose by
    methods = chosen_methods(args, tasks)
    if lengths and not args.methods:
        methods = ["base", "prompt", "t2l", "t2l_shuffled"]

    # the hypernetworks of rows, and the adapters of the others
    reads = "documents" if args.tasks in data.DOCUMENTS else "descriptions"
    folders = {m: args.hypernet for m in methods if "t2l" in m}
    folders |= {"recon": args.recon} if "recon" in methods else {}
    folders |= {f"t2l/{Path(folder).name}": folder for folder in args.compare}
    loaded = {folder: generate.load_net(folder, args, reads) for folder in dict.fromkeys(folders.values())}
    nets = {row: loaded[folder] for row, folder in folders.items()}
    configs = [net.config for net in loaded.values()]
    sources = {}
    if "mt_lora" in methods:
        sources["mt_lora"], config = read_from({task.name: Path(args.mt_lora) for task in tasks})
        configs.append(config)
    if "oracle" in methods:
        sources["oracle"], config = read_from({task.name: Path(args.oracles) / task.name for task in tasks})
        configs.append(config)
    args.base_model = args.base_model or (configs[0].base_model if configs else "tiny")
    base, tokenizer = generate.load_for(configs, args)
    if args.instruction is None:
        args.instruction = any(getattr(config, "instruction", False) for config in configs)
    sources |= {row: written_by(net, base, tokenizer, args) for row, net in nets.items()}
    rows = list(dict.fromkeys([*methods, *folders]))

    results = {row: {} for row in rows}
    for row in rows if not lengths else []:
        adapters_of = sources.get(row, no_adapters)
        model.check_known(tokenizer, [question for task in tasks for question, _ in task.test])
        results[row] = score(tasks, row, adapters_of, base, tokenizer, args)
        print(f"{row:24} {statistics.fmean(results[row].values()):.3f}", flush=True)
    window = base.config.get_text_config().max_position_embeddings
    for n_lines in lengths:
        tasks = data.documents(args.tasks, n_lines, n_lines, args.n_examples or 25)
        model.check_known(tokenizer, [task.descriptions[0] for task in tasks])
        n_tokens = max(len(model.tokenize(tokenizer, task.descriptions[0])) for task in tasks)
        for row in rows:
            if row != "prompt" or n_tokens + 64 <= window:  # the question and the answer have to fit, too
                scores = score(tasks, row, sources.get(row, no_adapters), base, tokenizer, args)
                results[row][f"{n_tokens:,}"] = statistics.fmean(scores.values())
        print(f"{n_lines} lines, {n_tokens} tokens", flush=True)
    return results

# -------------------- The table and the picture --------------------

def interval(scores: list[float], n: int = 2000) -> str:
    """Where the mean lies in 95 of 100 draws of as many tasks, with repetition (bootstrap)."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(scores, k=len(scores))) for _ in range(n))
    return f"{means[n // 40]:.2f} to {means[-1 - n // 40]:.2f}"

def table(results: Scores, args) -> str:
    """The scores in markdown, a line per row; of documents and benchmarks a column each."""
    first = {name: 0 for scores in results.values() for name in scores}  # the columns or the tasks
    cell = lambda scores, n: f"{scores[n]:.2f}" if n in scores else ""
    if args.lengths:
        head = ["tokens of the document", *first]
        lines = [[row, *(cell(scores, n) for n in first)] for row, scores in results.items()]
    elif set(first) <= set(data.BENCHMARKS):
        names = [name for name in data.BENCHMARKS if name in first] + ["average"]
        means = {row: s | {"average": statistics.fmean(s.values())} for row, s in results.items()}
        published = lora.read(data.ASSETS / "benchmarks.json")["published"]
        for row, scores in published.get(model.preset_name(args.base_model), {}).items():
            comparable = [name for name in scores if name != "average" or len(first) == len(data.BENCHMARKS)]
            means[f"{row} (published)"] = {name: scores[name] / 100 for name in comparable}
        head = ["method", *names]
        lines = [[row, *(cell(scores, n) for n in names)] for row, scores in means.items()]
    else:
        head = ["method", f"right answers on {len(first)} {args.split} tasks", "95% interval", "worst task"]
        lines = []
        for row, scores in results.items():
            values = list(scores.values())
            lines.append([row, f"{statistics.fmean(values):.3f}", interval(values), f"{min(values):.2f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])

def plot(path: str, results: Scores, args) -> None:
    """Bars of all rows; of documents lines over the length."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 3.6 if args.lengths else 0.8 + 0.34 * len(results)
    fig, ax = plt.subplots(figsize=(7, height), layout="constrained")
    if args.lengths:
        for row, scores in results.items():
            ax.plot([int(n.replace(",", "")) for n in scores], list(scores.values()), "o-", label=row)
        ax.set(xscale="log", xlabel="tokens of the document", ylabel="right answers", ylim=(-0.03, 1.12))
        ax.legend(frameon=False)
    else:
        means = {row: statistics.fmean(scores.values()) for row, scores in reversed(results.items())}
        colors = ["#2f6db5" if row == "t2l" else "#b8c4d6" for row in means]
        ax.bar_label(ax.barh(list(means), list(means.values()), color=colors), fmt="%.2f", padding=3)
        ax.set(xlim=(0, 1.12), xlabel=f"right answers on {args.split} tasks")
    ax.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)

def main() -> None:
    args = parse_args()
    results = evaluate(args)
    print("\n" + table(results, args))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        results = {row: scores for row, scores in results.items() if scores}
        scores = {row: {"mean": statistics.fmean(s.values()), "per_task": s} for row, s in results.items()}
        lora.write(Path(args.out), {"settings": vars(args), "results": scores})
    if args.plot:
        plot(args.plot, results, args)

if __name__ == "__main__":
    lora.command(main)
