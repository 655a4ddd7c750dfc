"""Judge adapters: the share of right answers, method by method, on seen and unseen tasks.

    python eval.py                                                  # the shipped hypernetwork on unseen tasks
    python eval.py --oracles DIR --mt_lora DIR --recon DIR --out results.json
    python eval.py --tasks facts --split long                                           # Doc-to-LoRA
    python eval.py --tasks benchmarks --base_model gemma-2-2b --hypernet DIR --run_code # the paper's table
    torchrun --nproc_per_node=2 eval.py ...                                             # the same, shared out

If an adapter was trained with --instruction, the prompt contains the task's definition or a description.
"""

import argparse
import random
import re
import statistics
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import generate
import lora
import model
from data import Example, Task
from lora import Adapter, LoRAConfig
from support import UserError, at_least, command, make_parser, read_json, say, write_file
from tasks import as_texts, benchmarks, load_tasks, summary

Scores = dict[str, float]  # {task: share of right answers}


@dataclass
class Exam:
    """Everything the methods need."""

    args: argparse.Namespace
    tasks: list[Task]
    training: list[Task]  # the split "train" of the same source, without documents
    nets: dict[str, nn.Module]  # {flag: a hypernetwork}
    adapters: dict[str, tuple[Adapter, LoRAConfig]]  # {flag: what its folder holds}
    base: nn.Module
    tokenizer: Any

    @cached_property
    def mean(self) -> Adapter:
        """The mean of what the hypernetwork writes for up to 512 training tasks. A [1, L, r, in]"""
        tasks, mean = self.training[:: ceil(len(self.training) / 512)], {}
        for task in tasks:  # one by one, since all at once would fill the memory
            adapter, _ = generate.write_adapters(self.nets["hypernet"], [task.descriptions[0]], self.base)
            for name, (A, B) in adapter.items():
                mean_A, mean_B = mean.get(name, (0, 0))
                mean[name] = (mean_A + A / len(tasks), mean_B + B / len(tasks))
        return mean


# -------------------- The methods --------------------


def texts_for(exam: Exam, i: int, kind: str) -> Sequence[str]:
    """What the hypernetwork reads for task i; () if there is nothing of this kind."""
    if kind == "own":
        return exam.tasks[i].descriptions
    if kind == "reworded":
        return exam.tasks[i].reworded
    if kind == "another":
        return exam.tasks[(i + 1) % len(exam.tasks)].descriptions if len(exam.tasks) > 1 else ()
    rng, noise = random.Random(i), []  # 8 sentences of random letters; of a benchmark the published texts
    for _ in range(8):
        words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(12)]
        noise.append(" ".join(words))
    return exam.tasks[i].rules.meaningless or noise


class Method(NamedTuple):
    """What answers the questions of a task."""

    meaning: str
    folder: str = ""  # the flag that names the folder of the adapter, or of the network that writes it
    reads: str = ""  # what the network reads, see `texts_for`; "mean": one adapter for all tasks
    needs: str = ""  # what is missing where there is nothing to read, or to ask
    shows: str = ""  # what stands in the prompt without being asked for
    n_shots: int = 0  # examples in the prompt
    asks: str = "test"  # which examples of the task


OTHER = "documents with other text"
METHODS = {
    "base": Method("the base model as it is"),
    "icl": Method("three examples in the prompt", n_shots=3),
    "prompt": Method("the description (or the document) in the prompt", shows="own"),
    "mt_lora": Method("one LoRA trained on all tasks", "mt_lora"),
    "oracle": Method("a LoRA trained on the task itself", "oracles"),
    "net": Method("written from the task's descriptions (or the document)", "hypernet", "own"),
    "net_reworded": Method("... wordings that training never used", "hypernet", "reworded", "other wordings"),
    "net_shuffled": Method("... another task's descriptions", "hypernet", "another", "a second task"),
    "net_mean": Method("the mean of those for training tasks", "hypernet", "mean", "training tasks"),
    "net_random": Method("written from meaningless text", "hypernet", "noise"),
    "base_other": Method("as base, on text beside the document", needs=OTHER, asks="other"),
    "net_other": Method("as net, on text beside the document", "hypernet", "own", OTHER, asks="other"),
    "recon": Method("as net, by a network trained by reconstruction", "recon", "own"),
}


def lacks(exam: Exam, name: str) -> str:
    """What a method needs and does not have; "" if it can run."""
    method = METHODS[name]
    if method.folder and method.folder not in {*exam.nets, *exam.adapters}:
        return f"--{method.folder} DIR"
    for i, task in enumerate(exam.tasks):
        has_texts = exam.training if method.reads == "mean" else texts_for(exam, i, method.reads or "own")
        if not getattr(task, method.asks) or not has_texts:
            return method.needs
    return ""


def adapters_of(exam: Exam, method: Method, i: int) -> tuple[Adapter, LoRAConfig]:
    """(adapters with which the questions of task i are answered in turn; {} is none, their config)."""
    task = exam.tasks[i]
    if not method.folder:
        return {}, LoRAConfig()
    if method.folder in exam.adapters:
        adapters, config = exam.adapters[method.folder]
        return (lora.select(adapters, [i]) if method.folder == "oracles" else adapters), config
    net = exam.nets[method.folder]
    if method.reads == "mean":
        return exam.mean, net.config
    n_texts = max(len(examples_of(exam, task, method)), task.rules.n_texts)
    adapters, _ = generate.write_adapters(net, list(texts_for(exam, i, method.reads)[:n_texts]), exam.base)
    return adapters, net.config


def instructions_of(exam: Exam, method: Method, i: int, config: LoRAConfig) -> Sequence[str]:
    """What stands before the inputs, in turn: nothing, unless the method, training or --instruction asks."""
    task = exam.tasks[i]
    if method.shows:
        return texts_for(exam, i, method.shows)
    asked_for = exam.args.instruction
    has_instruction = config.instruction if asked_for is None else asked_for
    if not has_instruction or not task.rules.with_instruction:
        return [""]
    texts = texts_for(exam, i, "reworded" if method.reads == "reworded" else "own")
    texts = [task.definition] if task.definition else texts[: len(examples_of(exam, task, method))]
    return [model.instruct(text) for text in texts]


# -------------------- Questions, answers and scores --------------------


def examples_of(exam: Exam, task: Task, method: Method) -> Sequence[Example]:
    """The examples of a task that are asked."""
    return getattr(task, method.asks)[: exam.args.n_examples or task.rules.most_examples]


class Question(NamedTuple):
    """An example as it is put to the base model."""

    task: int  # its number
    example: Example
    adapter: Adapter  # n = 1; {} is none
    prompt: str
    n_tokens: int  # of the prompt
    most: int  # tokens of an answer, at most


def questions_of(exam: Exam, name: str, i: int) -> tuple[list[Question], LoRAConfig]:
    """(the questions of task i, the config of their adapters). Benchmarks ask with several texts each."""
    method, task = METHODS[name], exam.tasks[i]
    examples, before = examples_of(exam, task, method), model.turn_of(exam.tokenizer).before
    adapters, config = adapters_of(exam, method, i)
    instructions = instructions_of(exam, method, i, config)
    n_adapters = len(next(iter(adapters.values()))[0]) if adapters else 1
    single = [adapters]  # the same object for all tasks, if they share it
    if n_adapters > 1:
        single = [lora.select(adapters, slice(k, k + 1)) for k in range(n_adapters)]
    most = task.rules.most_tokens
    if not most:  # two more than the longest right answer has
        rights = [right for example in examples for right in example.answers]
        most = 2 + max(len(model.tokenize(exam.tokenizer, right)) for right in rights)
    most = min(most, exam.args.max_new_tokens or most)
    questions = []
    for k, example in enumerate(examples):
        # one more than is needed, because the question itself may be among them
        others = [shot for shot in task.train[: method.n_shots + 1] if shot.input != example.input]
        shots = [(shot.input, shot.answers[0]) for shot in others[: method.n_shots]]
        for turn in range(k, k + min(task.rules.n_texts, max(n_adapters, len(instructions)))):
            instruction = instructions[turn % len(instructions)]
            prompt = model.render(exam.tokenizer, example.input, instruction, shots)
            if start := task.rules.start(example):
                prompt += before + start
            n_tokens = len(model.tokenize(exam.tokenizer, prompt))
            questions.append(Question(i, example, single[turn % n_adapters], prompt, n_tokens, most))
    return questions, config


def answers_to(exam: Exam, questions: list[Question], config: LoRAConfig) -> list[dict]:
    """Put questions to the base model, --batch_size at a time: what came of each, in their order."""
    found, by_length = {}, sorted(range(len(questions)), key=lambda k: questions[k].n_tokens)
    for start in range(0, len(questions), exam.args.batch_size):
        numbers = by_length[start : start + exam.args.batch_size]
        batch = [questions[k] for k in numbers]
        adapters = [question.adapter for question in batch]
        is_shared = all(adapter is adapters[0] for adapter in adapters)  # then it serves all rows
        adapters = adapters[0] if is_shared else lora.concat(adapters)  # A [batch, L, r, in]
        most = max(question.most for question in batch)
        with lora.use(exam.base, adapters, config.scaling):
            prompts = [question.prompt for question in batch]
            answers = model.answer(exam.base, exam.tokenizer, prompts, most)
        for k, question, answer in zip(numbers, batch, answers):
            task, example = exam.tasks[question.task], question.example
            has_ended = answer.has_ended and answer.n_tokens <= question.most
            found[k] = {
                "task": task.name,
                "input": example.input,
                "right": example.answers,
                "answer": answer.text,
                "score": float(task.rules.is_right(example, answer.text, has_ended)),
                "sure": config.certainty(answer.log_prob),
            }
    return [found[k] for k in range(len(questions))]


def score(name: str, exam: Exam, process: int = 0, n_processes: int = 1) -> list[dict]:
    """Ask the questions of all tasks, with a method. Prints the scores; returns what came of each question.

    Several processes share the tasks; the results are those of one. The questions of several tasks go through
    the base model together. A question that does not fit into its window is left out.
    """
    mine, window = range(process, len(exam.tasks), n_processes), model.window_of(exam.base)
    outcomes, waiting, n_too_long, n_tokens, seconds = {}, [], 0, 0, 0.0  # {number of a task: outcomes}
    for i in tqdm(mine, desc=name, unit="task", leave=False, disable=process > 0):
        questions, config = questions_of(exam, name, i)
        fitting = [question for question in questions if question.n_tokens + question.most <= window]
        waiting, n_too_long = waiting + fitting, n_too_long + len(questions) - len(fitting)
        following, task = i + n_processes, exam.tasks[i]
        goes_on = following in mine and exam.tasks[following].rules == task.rules
        if goes_on and len(waiting) < exam.args.batch_size and not task.is_document:  # their ranks differ
            continue
        started = time.perf_counter()
        for question, outcome in zip(waiting, answers_to(exam, waiting, config)):
            outcomes.setdefault(question.task, []).append(outcome)
            n_tokens += question.n_tokens
        waiting, seconds = [], seconds + time.perf_counter() - started
    n_asked = sum(map(len, outcomes.values()))
    if n_processes > 1:
        gathered = [None] * n_processes
        dist.all_gather_object(gathered, (outcomes, n_too_long))
        for its_outcomes, _ in gathered:
            outcomes |= its_outcomes
        n_too_long = sum(n for _, n in gathered)
    rows = [row for i in sorted(outcomes) for row in outcomes[i]]
    if n_too_long:
        say(f"{n_too_long} questions are left out, longer than the base model's window of {window}")
    if n_asked:
        cost = f"{n_tokens / n_asked:.0f} tokens in a prompt, {1000 * seconds / n_asked:.0f} ms for an answer"
        say(f"{name:24} {statistics.fmean(task_scores(rows).values()):.3f}   {cost}")
    if rows and METHODS[name].reads:
        area, error, half = certainty_scores(rows)
        say(f"{'':33}how sure: area {area:.2f}, error {error:.2f}; the surest half {half:.3f}")
    return rows


def task_scores(rows: list[dict]) -> Scores:
    """The mean score of each task. Tasks with the same name count as one (documents)."""
    scores = {}
    for row in rows:
        scores.setdefault(row["task"], []).append(row["score"])
    return {task: statistics.fmean(its) for task, its in scores.items()}


def certainty_scores(rows: list[dict]) -> tuple[float, float, float]:
    """How well `sure` tells which answers are right: (area under the ROC curve, calibration error in ten
    bins, score of the surest half). The area is nan if all answers are right, or none.
    """
    sure, right = np.array([(row["sure"], row["score"]) for row in rows]).T  # [n], [n]
    area, of_right, of_wrong = np.nan, sure[right > 0][:, None], sure[right == 0]
    if len(of_right) and len(of_wrong):  # how often a right answer is surer than a wrong one
        area = (of_right > of_wrong).mean() + (of_right == of_wrong).mean() / 2
    in_bin = np.minimum(sure * 10, 9).astype(int)
    error = abs(np.bincount(in_bin, sure - right)).sum() / len(rows)
    half = right[np.argsort(-sure, kind="stable")[: -(-len(rows) // 2)]].mean()
    return float(area), float(error), float(half)


# -------------------- The flags, and what they name --------------------


def parse_args() -> argparse.Namespace:
    """The flags."""
    methods = [f"    {name:15} {method.meaning}" for name, method in METHODS.items()]
    parser = make_parser("\n".join([__doc__, "The methods:\n", *methods]))
    add = parser.add_argument
    add("--tasks", default="tiny", help="as for train.py; or benchmarks, or some of these: arc_easy,gsm8k")
    add("--split", default="test", help="which of the tasks: train, val, test, or another that they have")
    add("--n_tasks", type=at_least(0), default=0, help="use so many of them (0: all)")
    add("--n_examples", type=at_least(1), help="per task; default: 25, of benchmarks all")
    add("--methods", help="comma-separated; default: all that have what they need")
    add("--mt_lora", help="adapter folder of train.py --mode lora --multi_task")
    add("--oracles", help="folder of adapter folders, one per task, of train.py --mode lora")
    add("--recon", help="folder of train.py --mode recon")
    add("--descriptions", help='JSON file {"task": ["description", ...]} to use instead')
    add("--run_code", action="store_true", help="run code that the model writes: no sandbox!")
    add("--batch_size", type=at_least(1), default=256, help="questions that are answered at once")
    add("--max_new_tokens", type=at_least(1), help="longest answer; default: as long as the right ones need")
    add("--out", help="write settings and scores to this JSON file, all answers to NAME.answers.json")
    generate.add_model_flags(parser)
    args = parser.parse_args()
    args.methods = args.methods and args.methods.split(",")
    for name in args.methods or []:
        if name not in METHODS:
            raise UserError(f"--methods: there is no method {name!r}, but {', '.join(METHODS)}")
    args.base_model = args.base_model and model.resolve(args.base_model)
    if args.out and Path(args.out).exists():
        content = read_json(args.out)
        if not isinstance(content, dict) or content.keys() != {"settings", "results"}:
            raise UserError(f"--out {args.out} is there already, and does not hold results of eval.py")
    return args


def tasks_to_judge(args) -> tuple[list[Task], list[Task]]:
    """(tasks of --tasks and --split, with the texts of --descriptions; training tasks without documents)."""
    splits = benchmarks.load(args.tasks, args.run_code) or load_tasks(args.tasks)
    say(summary(args.tasks, splits))
    tasks = data.pick(splits, args.split, args.n_tasks)
    if args.descriptions:
        texts, n_tasks = read_json(args.descriptions), len(tasks)
        tasks = [task for task in tasks if task.name in texts]
        if not tasks:
            raise UserError(f"{args.descriptions} has no descriptions of the {args.split} tasks")
        say(f"{args.descriptions} has descriptions of {len(tasks)} of {n_tasks} tasks")
        for i, task in enumerate(tasks):
            where = f"{args.descriptions}: {task.name}"
            tasks[i] = replace(task, descriptions=as_texts(texts[task.name], where), reworded=[])
    if args.instruction and tasks[0].is_document:
        raise UserError("--instruction would put the document itself into the prompt")
    for i, task in enumerate(tasks):
        tasks[i] = replace(task, rules=task.rules or benchmarks.Rules())
        n_train = len(task.train)
        if args.oracles and task.test[:n_train] == task.train:  # oracles were trained on this part
            tasks[i] = replace(tasks[i], test=task.test[n_train:])
        if not tasks[i].test:
            advice = 'if it is named under "test" in splits.json, all its instances are asked'
            raise UserError(f"{task.name} has no test part: the last fifth of its instances; {advice}")
    return tasks, [task for task in splits.get("train", []) if not task.is_document]


def load_nets(args, tasks: list[Task], device) -> dict[str, nn.Module]:
    """{flag: hypernetwork}. The shipped one is loaded only if a method needs it."""
    reads, nets = "documents" if tasks[0].is_document else "descriptions", {}
    folder = args.hypernet
    if not folder and any(METHODS[name].folder == "hypernet" for name in args.methods or METHODS):
        folder = generate.shipped_hypernet(args.base_model or model.TINY, reads)
    if folder:
        nets["hypernet"] = generate.load_net(folder, reads, device, args.encoder)
    if args.recon:
        nets["recon"] = generate.load_net(args.recon, reads, device)
        if not nets["recon"].config.recon_loss:
            raise UserError(f"--recon {args.recon}: this hypernetwork was trained by SFT")
    return nets


def trained_adapters(args, tasks: list[Task], device) -> dict[str, tuple[Adapter, LoRAConfig]]:
    """{flag: (adapters, their config)}; of --oracles one for each task, in their order."""
    folders, adapters = {}, {}
    if args.mt_lora:
        folders["mt_lora"] = [Path(args.mt_lora)]
    if args.oracles:
        folders["oracles"] = [Path(args.oracles, task.name) for task in tasks]
    for flag in {METHODS[name].folder for name in args.methods or METHODS} & folders.keys():
        missing = [folder for folder in folders[flag] if not folder.is_dir()]
        if missing:
            message = f"{len(missing)} of {len(tasks)} adapters are missing, such as {missing[0]}"
            raise UserError(f"--{flag}: {message} (--split, --n_tasks as in training)")
        adapters[flag] = lora.load_adapters(folders[flag], device)
    return adapters


@torch.no_grad()
def main() -> None:
    args = parse_args()
    device = model.pick_device(args.device)
    process, n_processes = model.join_processes(device)
    tasks, training = tasks_to_judge(args)
    nets, adapters = load_nets(args, tasks, device), trained_adapters(args, tasks, device)
    configs = [net.config for net in nets.values()] + [config for _, config in adapters.values()]
    base, tokenizer = generate.load_base_for(configs, args, device)
    for net in nets.values():
        net.connect(base, tokenizer)
    exam, answers, left_out = Exam(args, tasks, training, nets, adapters, base, tokenizer), {}, []
    for task in tasks:
        model.check_known(tokenizer, [example.input for example in examples_of(exam, task, METHODS["net"])])
    for name in args.methods or METHODS:
        missing = lacks(exam, name)
        if missing and args.methods:
            raise UserError(f"the method {name} needs {missing}")
        if missing:
            left_out.append(f"{name} (needs {missing})")
            continue
        answers[name] = score(name, exam, process, n_processes)
        if args.out and process == 0:
            write_results(Path(args.out), vars(args) | {"base_model": base.name_or_path}, answers)
    if left_out:
        say(f"left out: {', '.join(left_out)}")
    results = {name: task_scores(rows) for name, rows in answers.items() if rows}
    say("\n" + make_table(benchmarks.beside_published(results, base.name_or_path), args.split))
    if dist.is_initialized():
        dist.destroy_process_group()


def write_results(out: Path, settings: dict, answers: dict[str, list[dict]]) -> None:
    """Write --out, after each method, and all answers beside it."""
    results = {}
    for name, rows in answers.items():
        scores = task_scores(rows)
        if scores:
            results[name] = {"mean": statistics.fmean(scores.values()), "per_task": scores}
    write_file(out, {"settings": settings, "results": results})
    write_file(out.with_suffix(".answers.json"), answers)


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
