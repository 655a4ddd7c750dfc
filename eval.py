"""Judge adapters: the share of right answers, method by method, on seen and unseen tasks.

    python eval.py                                                  # the shipped hypernetwork on unseen tasks
    python eval.py --oracles DIR --mt_lora DIR --recon DIR --out results.json
    python eval.py --tasks facts --split long                                           # Doc-to-LoRA
    python eval.py --tasks benchmarks --base_model gemma-2-2b --hypernet DIR --run_code # the paper's table

The methods:

    base            the base model as it is
    icl             three examples in the prompt
    prompt          the description (or the document) in the prompt
    mt_lora         one LoRA trained on all tasks                                  (--mt_lora DIR)
    oracle          a LoRA trained on the task itself                              (--oracles DIR)
    t2l             the hypernetwork's adapter, from the task's own descriptions (or the document)
    t2l_reworded    from wordings that training never used    (tiny; chores)
    t2l_shuffled    from another task's description
    t2l_mean        the mean of what the hypernetwork writes for the training tasks
    t2l_random      from meaningless text
    recon           a hypernetwork trained by reconstruction                       (--recon DIR)

If the adapter was trained with --instruction, the task's definition, or a description, stands in the prompt.
"""

import argparse
import math
import random
import re
import statistics
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import data
import generate
import lora
import model
from data import Example, Task
from support import UserError, check_output, command, make_parser, read_json, write_file
from tasks import as_texts, benchmarks, load_tasks, summary

Scores = dict[str, float]  # {task: share of right answers}


class Question(NamedTuple):
    """A test example as it is put to the base model."""

    task: Task
    example: Example
    description: str  # from which its adapter is written
    prompt: str
    n_prompt: int  # tokens
    most_tokens: int  # of the answer

    def size(self) -> tuple[int, int, int]:
        """Questions of similar size are answered together, since a batch takes as long as its longest."""
        length = len(self.description) if self.task.is_document else 0  # the rank goes by it
        return length, self.most_tokens, self.n_prompt


# -------------------- Where adapters come from --------------------


class Source(NamedTuple):
    """What is loaded from a folder, by one of the functions below."""

    config: lora.LoRAConfig  # of its adapters
    net: nn.Module | None  # the hypernetwork that writes them, if there is one
    adapters: Callable  # (base, questions) -> the adapters with which they are answered, as one batch


def one_adapter(folder: str, tasks: list[Task], args, device) -> Source:
    """An adapter that answers all questions."""
    adapter, config = lora.load_adapters([Path(folder)], device)
    return Source(config, None, lambda base, questions: adapter)


def oracles(folder: str, tasks: list[Task], args, device) -> Source:
    """An adapter for each task."""
    names = [task.name for task in tasks]
    missing = [name for name in names if not Path(folder, name).is_dir()]
    if missing:
        message = f"{folder} holds adapters of {len(names) - len(missing)} of these {len(names)} tasks"
        raise UserError(f"{message}, not of {missing[0]} (--split, --n_tasks as in training)")
    bank, config = lora.load_adapters([Path(folder, name) for name in names], device)

    def choose(base, questions: list[Question]) -> lora.Adapter:
        return lora.select(bank, [names.index(question.task.name) for question in questions])

    return Source(config, None, choose)


def hypernetwork(folder: str, tasks: list[Task], args, device) -> Source:
    """A hypernetwork that writes an adapter for each description."""
    net = generate.load_net(folder, "documents" if tasks[0].is_document else "descriptions", args, device)

    def write(base, questions: list[Question]) -> lora.Adapter:
        texts = list(dict.fromkeys(question.description for question in questions))  # each once per batch
        written, _ = generate.write_adapters(net, texts, base)
        return lora.select(written, [texts.index(question.description) for question in questions])

    return Source(net.config, net, write)


def imitator(folder: str, tasks: list[Task], args, device) -> Source:
    """A hypernetwork that was trained by reconstruction."""
    source = hypernetwork(folder, tasks, args, device)
    if not source.config.recon_loss:
        raise UserError(f"--recon {folder}: this hypernetwork was trained by SFT")
    return source


def mean_adapter(base, net, tasks: list[Task]) -> lora.Adapter:
    """The mean of what a hypernetwork writes for up to 512 training tasks. A [1, L, r, in]"""
    tasks, mean = tasks[:: math.ceil(len(tasks) / 512)], {}
    for task in tasks:  # one by one, since all at once would fill the memory
        written, _ = generate.write_adapters(net, [task.descriptions[0]], base)
        for name, pair in written.items():
            parts = [matrix / len(tasks) for matrix in pair]
            mean[name] = tuple(a + b for a, b in zip(mean.get(name, [0, 0]), parts))
    return mean


# -------------------- The methods --------------------


def own(tasks: list[Task], t: int) -> Sequence[str]:
    """The descriptions of task t."""
    return tasks[t].descriptions


def reworded(tasks: list[Task], t: int) -> Sequence[str]:
    return tasks[t].reworded


def of_next_task(tasks: list[Task], t: int) -> Sequence[str]:
    return tasks[(t + 1) % len(tasks)].descriptions if len(tasks) > 1 else []


def noise(tasks: list[Task], t: int) -> list[str]:
    """Text without meaning: 8 sentences of random letters."""
    rng = random.Random(t)
    sentences = []
    for _ in range(8):
        words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(12)]
        sentences.append(" ".join(words))
    return sentences


def no_text(tasks: list[Task], t: int) -> list[str]:
    """For adapters that are not written from texts."""
    return [""]


class Method(NamedTuple):
    """Whose adapter answers, from which texts it is written, and what stands in the prompt."""

    source: Callable | None = None  # one of the functions above; None is no adapter
    flag: str = ""  # which names the source's folder
    texts: Callable[[list[Task], int], Sequence[str]] = no_text  # [] if a task has none
    instructions: Callable[[list[Task], int], Sequence[str]] = own  # for prompts with an instruction
    is_mean: bool = False  # the mean adapter of the training tasks answers
    with_description: bool = False  # it stands in the prompt, whatever training did
    n_shots: int = 0  # examples in the prompt


METHODS = {
    "base": Method(),
    "icl": Method(n_shots=3),
    "prompt": Method(with_description=True),
    "mt_lora": Method(one_adapter, "mt_lora"),
    "oracle": Method(oracles, "oracles"),
    "t2l": Method(hypernetwork, "hypernet", own),
    "t2l_reworded": Method(hypernetwork, "hypernet", reworded, instructions=reworded),
    "t2l_shuffled": Method(hypernetwork, "hypernet", of_next_task),
    "t2l_mean": Method(hypernetwork, "hypernet", is_mean=True),
    "t2l_random": Method(hypernetwork, "hypernet", noise),
    "recon": Method(imitator, "recon", own),
}


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--tasks", default="tiny", help="as for train.py; or benchmarks, or some of these: arc_easy,gsm8k")
    add("--split", default="test", help="which of the tasks: train, val, test, or another that they have")
    add("--n_tasks", type=int, default=0, help="use so many of them (0: all)")
    add("--n_examples", type=int, help="per task; default: 25, of benchmarks all")
    add("--methods", help="comma-separated; default: all that have what they need")
    add("--mt_lora", help="adapter folder of train.py --mode lora --multi_task")
    add("--oracles", help="folder of adapter folders, one per task, of train.py --mode lora")
    add("--recon", help="folder of train.py --mode recon")
    add("--compare", nargs="+", default=[], help="folders of further hypernetworks, each a method")
    add("--descriptions", help='JSON file {"task": ["description", ...]} to use instead')
    add("--contains", action="store_true", help="an answer is right if it contains a right answer")
    add("--run_code", action="store_true", help="run code that the model writes: no sandbox!")
    add("--batch_size", type=int, default=256, help="inputs that are answered at once")
    add("--out", help="write settings and scores to this JSON file; extras.plot draws them")
    generate.add_model_flags(parser)
    args = parser.parse_args()
    if args.batch_size < 1 or args.n_tasks < 0 or (args.n_examples or 0) < 0:
        raise UserError("--batch_size must be above 0, --n_tasks and --n_examples not below")
    return args


def choose_tasks(args) -> tuple[list[Task], list[Task]]:
    """(the tasks of --tasks and --split, with the texts of --descriptions; those of "train")."""
    names = benchmarks.names_in(args.tasks, args.run_code)
    if names and args.contains:
        raise UserError("--contains is not for benchmarks, which have scores of their own")
    splits = benchmarks.load(names) if names else load_tasks(args.tasks)
    print(summary(args.tasks, splits))
    tasks = data.pick(splits, args.split, args.n_tasks)
    if args.descriptions:
        texts = read_json(args.descriptions)
        tasks = [task for task in tasks if task.name in texts]
        if not tasks:
            raise UserError(f"{args.descriptions} has no descriptions of the {args.split} tasks")
        for i, task in enumerate(tasks):
            where = f"{args.descriptions}: {task.name}"
            tasks[i] = replace(task, descriptions=as_texts(texts[task.name], where), reworded=[])
    if args.instruction and tasks[0].is_document:
        raise UserError("--instruction would put the document itself into the prompt")
    for task in tasks:
        if not task.test:
            raise UserError(f"the task {task.name} has no test part: that is the last fifth of its instances")
        if not all(example.answers for example in task.test):
            raise UserError(f"{task.name} cannot be scored: one of its questions has no answer")
    return tasks, [task for task in splits.get("train", []) if not task.is_document]


def choose_methods(args, tasks: list[Task], training: list[Task]) -> dict[str, tuple[Method, str]]:
    """{name: (method, folder of its adapters)}: --methods, or all that have what they need; and --compare."""
    chosen, left_out = {}, []
    for name in args.methods.split(",") if args.methods else METHODS:
        if name not in METHODS:
            raise UserError(f"--methods: there is no method {name!r}, but {', '.join(METHODS)}")
        method, lacks = METHODS[name], ""
        folder = getattr(args, method.flag, None) or ""
        if method.flag == "hypernet" and not folder:
            try:
                reads = "documents" if tasks[0].is_document else "descriptions"
                folder = generate.shipped_hypernet(args.base_model or "tiny", reads)
            except UserError as e:
                lacks = str(e)
        elif method.flag and not folder:
            lacks = f"needs --{method.flag} DIR"
        if not all(method.texts(tasks, t) for t in range(len(tasks))) or (method.is_mean and not training):
            lacks = "needs descriptions that these tasks do not have, a second task, or training tasks"
        if lacks and args.methods:
            raise UserError(f"the method {name}: {lacks}")
        if lacks:
            left_out.append(f"{name} ({lacks})")
        else:
            chosen[name] = method, folder
    for folder in args.compare:
        label = folder if "/" in folder else f"./{folder}"  # which no method is called
        chosen[label] = METHODS["t2l"], folder
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    return chosen


# -------------------- Scores --------------------


def ask(tasks: list[Task], method: Method, with_instruction: bool, args, base, tokenizer) -> list[Question]:
    """The questions of a method: all test examples of the tasks, with the texts that it takes.

    Those whose prompt does not fit into the base model's window are left out.
    """
    questions, n_too_long, window = [], 0, model.window_of(base)
    for t, task in enumerate(tasks):
        instructions = method.instructions(tasks, t)
        for i, description in task.asked(method.texts(tasks, t), args.n_examples):
            example, instruction = task.test[i], ""
            if method.with_description:
                instruction = instructions[i % len(instructions)]
            elif with_instruction:
                instruction = task.instruction(instructions[i % len(instructions)])
            # one more than is needed, because the question itself may be among them
            others = [shot for shot in task.train[: method.n_shots + 1] if shot.input != example.input]
            shots = [(shot.input, shot.answers[0]) for shot in others[: method.n_shots]]
            chat = model.chat(tokenizer, example.input, instruction, shots)
            prompt = model.render(tokenizer, chat) + task.start(example)
            n_prompt, most = len(model.tokenize(tokenizer, prompt)), task.most_tokens(tokenizer, example)
            most = min(most, args.max_new_tokens or most)
            if args.contains:
                most = args.max_new_tokens or max(64, most)
            if n_prompt + most <= window:
                questions.append(Question(task, example, description, prompt, n_prompt, most))
            else:
                n_too_long += 1
    if n_too_long:
        print(f"{n_too_long} questions are left out, longer than the base model's window of {window}")
    model.check_known(tokenizer, [question.example.input for question in questions])
    return sorted(questions, key=Question.size)


def score(name: str, questions: list[Question], source: Source, args, base, tokenizer) -> Scores:
    """The scores of a method, which are printed. Documents of equal names count as one task."""
    hits, seconds = {}, 0.0
    bar = tqdm(total=len(questions), desc=name, unit="answer", leave=False)
    for i in range(0, len(questions), args.batch_size):
        batch = questions[i : i + args.batch_size]
        prompts, most = [question.prompt for question in batch], [question.most_tokens for question in batch]
        with lora.use(base, source.adapters(base, batch), source.config.scaling):
            started = time.perf_counter()  # without the writing of adapters
            answers, ended = model.answer(base, tokenizer, prompts, most)
            seconds += time.perf_counter() - started
        for question, answer, has_ended in zip(batch, answers, ended):
            hit = question.task.is_right(question.example, answer, has_ended, args.contains)
            hits.setdefault(question.task.name, []).append(hit)
        bar.update(len(batch))
    bar.close()
    scores = {task: statistics.fmean(its_hits) for task, its_hits in hits.items()}
    if scores:
        n_tokens = statistics.fmean(question.n_prompt for question in questions)
        cost = f"{n_tokens:.0f} tokens in a prompt, {1000 * seconds / len(questions):.0f} ms for an answer"
        print(f"{name:24} {statistics.fmean(scores.values()):.3f}   {cost}", flush=True)
    return scores


@torch.no_grad()
def main() -> None:
    args = parse_args()
    if args.out:
        check_output(args.out, ".json")
    device = model.pick_device(args.device)
    tasks, training = choose_tasks(args)
    methods, sources = choose_methods(args, tasks, training), {}  # {(function, folder): Source}
    for method, folder in methods.values():
        if method.source and (method.source, folder) not in sources:
            sources[method.source, folder] = method.source(folder, tasks, args, device)
    # hypernetworks go first: they record the base model by its name
    configs = [source.config for source in sorted(sources.values(), key=lambda source: source.net is None)]
    base, tokenizer = generate.load_base_for(configs, args, device)
    for source in sources.values():
        if source.net:
            source.net.connect(base, tokenizer)

    base_model, results = args.base_model or (configs[0].base_model if configs else "tiny"), {}
    for name, (method, folder) in methods.items():
        source = Source(lora.LoRAConfig(), None, lambda base, questions: {})  # no adapter
        if method.source:
            source = sources[method.source, folder]
        if method.is_mean:
            mean = mean_adapter(base, source.net, training)
            source = source._replace(adapters=lambda base, questions: mean)
        with_instruction = source.config.instruction if args.instruction is None else args.instruction
        questions = ask(tasks, method, with_instruction, args, base, tokenizer)
        scores = score(name, questions, source, args, base, tokenizer)
        if scores:
            results[name] = scores
        if args.out:
            write_results(Path(args.out), vars(args) | {"base_model": base_model}, results)
    if isinstance(tasks[0], benchmarks.Benchmark):
        results = benchmarks.beside_published(results, model.preset_of(base_model))
    print("\n" + make_table(results, args.split))


def write_results(out: Path, settings: dict, results: dict[str, Scores]) -> None:
    """Write --out, after each method."""
    content = {}
    for name, scores in results.items():
        content[name] = {"mean": statistics.fmean(scores.values()), "per_task": scores}
    write_file(out, {"settings": settings, "results": content})


# -------------------- The table --------------------


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


if __name__ == "__main__":
    command(main)
