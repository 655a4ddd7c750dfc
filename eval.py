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
    t2l_reworded    from wordings that training never used                         (tiny world and chores)
    t2l_shuffled    from another task's description
    t2l_random      from meaningless text
    recon           a hypernetwork trained by reconstruction                       (--recon DIR)
"""

import argparse
import importlib
import os
import random
import statistics
import string
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import data
import generate
import hypernet
import lora
import model
from data import Example, Task
from support import flags, hub, processes
from support.files import UserError, command, read_file, write_file
from support.processes import Process
from tasks import SOURCES, benchmarks, load_tasks
from tasks import folder as task_folder
from tasks.documents import make_documents

METHODS = "base icl prompt mt_lora oracle t2l t2l_reworded t2l_shuffled t2l_random recon".split()
Results = dict[str, dict[str, float]]  # {method: {task, or length of document: share of right answers}}


def numbers(text: str) -> list[int]:
    """ "4,16" -> [4, 16]"""
    values = [int(n) for n in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--tasks", default="tiny", help="as for train.py; or benchmarks, or some of these: arc_easy,gsm8k")
    add("--split", default="test", help="which of the tasks: train, val, test")
    add("--n_tasks", type=flags.at_least(0), default=0, help="use so many of them (0: all)")
    add("--n_examples", type=flags.at_least(1), help="per task or length; default: 25, of benchmarks all")
    add("--methods", help="comma-separated; default: all that have what they need")
    add("--mt_lora", help="adapter folder of train.py --mode lora --multi_task")
    add("--oracles", help="folder of adapter folders, one per task, of train.py --mode lora")
    add("--recon", help="folder of train.py --mode recon")
    add("--compare", nargs="+", default=[], help="folders of further hypernetworks, each a method")
    add("--descriptions", help='JSON file {"task": ["description", ...]} to use instead')
    add("--lengths", type=numbers, help="for facts and needle: score documents of, say, 4,16,64 lines")
    add("--contains", action="store_true", help="an answer is right if it contains a right answer")
    add("--run_code", action="store_true", help="run code that the model writes: no sandbox!")
    add("--batch_size", type=flags.at_least(1), default=256, help="inputs that are answered at once")
    add("--out", help="write settings and scores to this JSON file")
    add("--plot", help="draw the scores into this PNG file (needs matplotlib)")
    generate.add_model_flags(parser)
    args = parser.parse_args()
    processes.check_shard(args.shard)
    if args.plot and not find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    return args


# -------------------- What is evaluated --------------------


def choose_tasks(args) -> list[Task]:
    """The tasks of --tasks and --split, with the descriptions of --descriptions."""
    names = benchmarks.names_in(args.tasks, args.run_code)
    splits = benchmarks.load(names) if names else load_tasks(args.tasks)
    if int(os.environ.get("RANK", 0)) == 0:
        print(task_folder.summary(args.tasks, splits))
    tasks = data.distinct(data.pick(splits, args.split, args.n_tasks))
    if args.descriptions:
        descriptions = read_file(args.descriptions)
        if not isinstance(descriptions, dict):
            raise UserError(f'{args.descriptions} must be {{"task": ["description", ...], ...}}')
        tasks = [task for task in tasks if task.name in descriptions]
        if not tasks:
            raise UserError(f"{args.descriptions} has no descriptions of the {args.split} tasks")
        for i, task in enumerate(tasks):
            texts = task_folder.as_texts(descriptions[task.name], f"{args.descriptions}: {task.name}")
            tasks[i] = replace(task, descriptions=texts, reworded=[])
    if args.instruction and tasks[0].is_document:
        raise UserError("--instruction goes with descriptions, not with documents")
    for task in tasks:
        if not task.test:
            raise UserError(f"the task {task.name} has no test part: that is the last fifth of its instances")
        if not all(example.answers for example in task.test):
            raise UserError(f"{task.name} cannot be scored: one of its questions has no answer")
    return tasks


def documents_by_length(args) -> dict[int, list[Task]]:
    """For --lengths: {number of lines: documents}."""
    source = importlib.import_module(f"tasks.{args.tasks}") if args.tasks in SOURCES else None
    if not hasattr(source, "document"):
        raise UserError("--lengths goes with --tasks facts or needle")
    documents = {}
    for n_lines in args.lengths:
        one_length, seed = (n_lines, n_lines), f"{args.tasks} exam"
        documents[n_lines] = make_documents(source.document, one_length, args.n_examples or 25, seed)
    return documents


def choose_methods(args, tasks: list[Task]) -> list[str]:
    """Those of --methods, or all that have what they need."""
    missing = {}  # {method: what it needs}
    for method, flag in (("mt_lora", "mt_lora"), ("oracle", "oracles"), ("recon", "recon")):
        if not getattr(args, flag):
            missing[method] = f"--{flag} DIR"
    if not all(task.reworded for task in tasks):
        missing["t2l_reworded"] = "reworded descriptions, which these tasks do not have"
    if len(tasks) < 2:
        missing["t2l_shuffled"] = "two tasks"
    if args.methods:
        methods = args.methods.split(",")
    elif args.lengths:
        methods = ["base", "prompt", "t2l", "t2l_shuffled"]
    else:
        methods = [method for method in METHODS if method not in missing]
    for method in methods:
        if method not in METHODS:
            raise UserError(f"unknown method {method}; there are {', '.join(METHODS)}")
        if method in missing:
            raise UserError(f"the method {method} needs {missing[method]}")
    return methods


def net_folder(method: str, reads: str, args) -> str | None:
    """The folder of the hypernetwork that writes a method's adapters; None if there is none."""
    if method in args.compare:
        return method
    if method == "recon":
        return args.recon
    if method.startswith("t2l"):
        return args.hypernet or str(generate.shipped_hypernet(args.base_model or "tiny", reads))
    return None


def encoder_key(net: nn.Module) -> tuple | None:
    """What the text encoder of a hypernetwork depends on; None if it reads documents."""
    c = net.config
    return (c.encoder, c.full_stop, c.encoder_rank > 0) if net.reads == "descriptions" else None


class Models:
    """The base model, and where the adapters of each method come from."""

    def __init__(self, args, methods: list[str], tasks: list[Task], process: Process):
        self.is_first = process.rank == 0
        self.methods = list(dict.fromkeys([*methods, *args.compare]))

        # 1. What was trained: hypernetworks, each loaded once, and adapters.
        reads = "documents" if tasks[0].is_document else "descriptions"
        self.folders, self.nets = {}, {}
        with processes.first_goes_ahead(process):
            for method in self.methods:
                folder = self.folders[method] = net_folder(method, reads, args)
                if folder and folder not in self.nets:
                    self.nets[folder] = generate.load_net(folder, reads, args, process.device)
        configs = [net.config for net in self.nets.values()]
        if "mt_lora" in methods:
            self.mt_lora, self.mt_config = lora.load_adapters([Path(args.mt_lora)], process.device)
            configs.append(self.mt_config)
        if "oracle" in methods:
            self.task_names = [task.name for task in tasks]
            oracle_folders = [Path(args.oracles) / name for name in self.task_names]
            self.oracles, self.oracle_config = lora.load_adapters(oracle_folders, process.device)
            configs.append(self.oracle_config)

        # 2. The base model of all of them, and their text encoders, each loaded once.
        self.base_model = args.base_model or (configs[0].base_model if configs else "tiny")
        with processes.first_goes_ahead(process):
            hub.fetch_models(self.base_model, "base")
        self.base, self.tokenizer = generate.load_base_for(configs, args, process)
        self.encoders = {}
        with processes.first_goes_ahead(process):
            for net in self.nets.values():
                if encoder_key(net) not in self.encoders:
                    encode = generate.load_encoder_for(net, self.base, self.tokenizer, args)
                    self.encoders[encoder_key(net)] = encode

    def has_instruction(self, method: str, args) -> bool:
        """Whether the instruction stands in a method's prompts: as a flag says, or as in training.

        A method without a network goes by the first network.
        """
        if args.instruction is not None:
            return args.instruction
        folder = self.folders[method] or next(iter(self.nets), None)
        return folder is not None and self.nets[folder].config.instruction

    @torch.no_grad()
    def set_adapters(self, method: str, questions: list["Question"]) -> None:
        """Set the adapters with which a method answers these questions."""
        if method in ("base", "icl", "prompt"):
            lora.set_adapter(self.base, None)
        elif method == "mt_lora":
            lora.set_adapter(self.base, self.mt_lora, self.mt_config.scaling)
        elif method == "oracle":
            indices = [self.task_names.index(question.task.name) for question in questions]
            adapters = lora.select(self.oracles, indices)
            lora.set_adapter(self.base, adapters, self.oracle_config.scaling)
        else:
            net = self.nets[self.folders[method]]
            texts = list(dict.fromkeys(question.description for question in questions))  # read once each
            encode = self.encoders[encoder_key(net)]
            written = net(hypernet.make_condition(net, texts, self.base, self.tokenizer, encode))
            indices = [texts.index(question.description) for question in questions]
            lora.set_adapter(self.base, lora.select(written, indices), net.config.scaling)


# -------------------- Scores --------------------


@dataclass
class Question:
    """One example to be answered."""

    task: Task
    example: Example
    description: str  # from which the adapter is written
    instruction: str  # stands in the prompt before the input
    shots: list[tuple[str, str]]


def noise(seed: int) -> list[str]:
    """Text without meaning: 8 sentences of random letters."""
    rng = random.Random(seed)
    sentences = []
    for _ in range(8):
        words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(12)]
        sentences.append(" ".join(words))
    return sentences


def make_questions(tasks: list[Task], method: str, with_instruction: bool, args) -> list[Question]:
    """All test examples, each with one of the descriptions in turn.

    An example of a benchmark is asked with each of three descriptions, as published.
    """
    questions = []
    for t, task in enumerate(tasks):
        descriptions = task.descriptions
        if method == "t2l_reworded":
            descriptions = task.reworded
        elif method == "t2l_shuffled":
            descriptions = tasks[(t + 1) % len(tasks)].descriptions
        elif method == "t2l_random":
            descriptions = noise(t)
        n_examples = args.n_examples or (None if task.is_benchmark else 25)
        for i, example in enumerate(task.test[:n_examples]):
            own_description = task.descriptions[i % len(task.descriptions)]
            instruction, shots = "", []
            if method == "prompt":
                instruction = own_description
            elif with_instruction and not task.is_benchmark:
                instruction = (task.definition or own_description) + model.SUFFIX
            if method == "icl":
                others = [shot for shot in task.train[:4] if shot.input != example.input]
                shots = [(shot.input, shot.answers[0]) for shot in others[:3]]
            used = [descriptions[i % len(descriptions)]]
            if task.is_benchmark and method not in ("base", "icl", "prompt", "mt_lora", "oracle"):
                used = descriptions[:3]
            for description in used:
                questions.append(Question(task, example, description, instruction, shots))
    return questions


def score(models: Models, tasks: list[Task], method: str, args) -> dict[str, float]:
    """{name of a task: share of right answers}. Documents of equal names count as one task."""
    tokenizer = models.tokenizer
    questions = make_questions(tasks, method, models.has_instruction(method, args), args)
    model.check_known(tokenizer, [question.example.input for question in questions])

    def sort_key(question: Question) -> tuple[int, int]:
        prompt = len(question.instruction) + len(question.example.input)
        return answer_tokens(tokenizer, question, args), prompt

    questions.sort(key=sort_key)  # a batch takes as long as its longest answer
    hits = {task.name: [] for task in tasks}
    bar = tqdm(total=len(questions), desc=method, unit="answer", leave=False, disable=not models.is_first)
    for i in range(0, len(questions), args.batch_size):
        batch = questions[i : i + args.batch_size]
        prompts = []
        for question in batch:
            chat = model.chat(tokenizer, question.example.input, question.instruction, question.shots)
            prompts.append(model.render(tokenizer, chat) + question.example.start)
        models.set_adapters(method, batch)
        max_tokens = max(answer_tokens(tokenizer, question, args) for question in batch)
        is_code = any(question.example.start.endswith("\n") for question in batch)
        answers = model.answer(models.base, tokenizer, prompts, max_tokens, strip=not is_code)
        for question, answer in zip(batch, answers):
            if args.contains and not question.task.is_benchmark:
                is_right = any(right in answer for right in question.example.answers)
            else:
                is_right = question.task.is_right(question.example, answer)
            hits[question.task.name].append(is_right)
        bar.update(len(batch))
    bar.close()
    return {name: statistics.fmean(hit) for name, hit in hits.items()}


def answer_tokens(tokenizer, question: Question, args) -> int:
    """How long an answer may get."""
    if question.task.answer_tokens:
        return question.task.answer_tokens
    if args.contains:
        return args.max_new_tokens
    longest = max(len(model.tokenize(tokenizer, right)) for right in question.example.answers)
    return min(args.max_new_tokens, longest + 2)  # a longer one is wrong anyway


def evaluate_tasks(models: Models, tasks: list[Task], args) -> Results:
    """The scores of all methods, by task."""
    results = {}
    for method in models.methods:
        results[method] = score(models, tasks, method, args)
        if models.is_first:
            print(f"{method:24} {statistics.fmean(results[method].values()):.3f}", flush=True)
    return results


def evaluate_lengths(models: Models, documents: dict[int, list[Task]], args) -> Results:
    """The scores of all methods, by the number of tokens of the documents."""
    window = models.base.config.get_text_config().max_position_embeddings
    results = {method: {} for method in models.methods}
    for n_lines, tasks in documents.items():
        texts = [task.descriptions[0] for task in tasks]
        model.check_known(models.tokenizer, texts)
        n_tokens = max(len(model.tokenize(models.tokenizer, text)) for text in texts)
        for method in models.methods:
            if method != "prompt" or n_tokens + 64 <= window:  # question and answer have to fit, too
                scores = score(models, tasks, method, args)
                results[method][f"{n_tokens:,}"] = statistics.fmean(scores.values())
        if models.is_first:
            print(f"{n_lines} lines, {n_tokens} tokens", flush=True)
    return results


# -------------------- Table and plot --------------------


def interval(scores: list[float], n: int = 2000) -> str:
    """95% interval of the mean: bootstrap over the tasks."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(scores, k=len(scores))) for _ in range(n))
    return f"{means[n // 40]:.2f} to {means[-1 - n // 40]:.2f}"


def make_table(results: Results, base_model: str, args) -> str:
    """The scores in markdown, one line per method; for lengths and benchmarks one column each."""
    columns = []  # tasks, benchmarks or lengths
    for scores in results.values():
        columns += [name for name in scores if name not in columns]
    if args.lengths:
        lines = wide_table("tokens of the document", columns, results)
    elif set(columns) <= set(benchmarks.BENCHMARKS):
        with_published = benchmarks.beside_published(results, hub.preset_of(base_model))
        lines = wide_table("method", sorted(columns) + ["average"], with_published)
    else:
        title = f"right answers on {len(columns)} {args.split} task{'s' if len(columns) > 1 else ''}"
        lines = [["method", title, "95% interval", "worst task"]]
        for method, scores in results.items():
            values = list(scores.values())
            lines.append([method, f"{statistics.fmean(values):.3f}", interval(values), f"{min(values):.2f}"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def wide_table(title: str, columns: list[str], results: Results) -> list[list[str]]:
    """The cells of a table with one column per length or benchmark."""
    lines = [[title, *columns]]
    for method, scores in results.items():
        cells = [f"{scores[name]:.2f}" if name in scores else "" for name in columns]
        lines.append([method, *cells])
    return lines


def plot(path: str, results: Results, args) -> None:
    """Bars of all methods; for lengths lines over the length."""
    import matplotlib  # optional, see parse_args

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


# -------------------- The run --------------------


def main() -> None:
    args = parse_args()
    process = generate.start(args)
    if args.lengths:
        documents = documents_by_length(args)
        tasks = documents[args.lengths[0]]
    else:
        with processes.first_goes_ahead(process):
            tasks = choose_tasks(args)
    models = Models(args, choose_methods(args, tasks), tasks, process)
    if args.lengths:
        results = evaluate_lengths(models, documents, args)
    else:
        results = evaluate_tasks(models, tasks, args)
    if models.is_first:  # the other processes have computed the same
        print("\n" + make_table(results, models.base_model, args))
        if args.out:
            scores = {}
            for method, per_task in results.items():
                if per_task:
                    scores[method] = {"mean": statistics.fmean(per_task.values()), "per_task": per_task}
            settings = vars(args) | {"base_model": models.base_model}
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            write_file(Path(args.out), {"settings": settings, "results": scores})
        if args.plot:
            plot(args.plot, results, args)
    processes.leave()


if __name__ == "__main__":
    command(main)
