"""Judge adapters: the share of right answers, method by method, on seen and unseen tasks.

    python eval.py                                                  # the shipped hypernetwork on unseen tasks
    python eval.py --oracles DIR --mt_lora DIR --recon DIR --out results.json
    python eval.py --tasks facts --split long                                           # Doc-to-LoRA
    python eval.py --tasks benchmarks --base_model gemma-2-2b --hypernet DIR --run_code # the paper's table
    torchrun --nproc_per_node=2 eval.py ...                                             # the same, shared out

The methods:

    base            the base model as it is
    icl             three examples in the prompt
    prompt          the description (or the document) in the prompt
    mt_lora         one LoRA trained on all tasks                                  (--mt_lora DIR)
    oracle          a LoRA trained on the task itself                              (--oracles DIR)
    net             the hypernetwork's adapter, from the task's own descriptions (or the document)
    net_reworded    from wordings that training never used        (tiny, chores, families, lots_of_loras)
    net_shuffled    from another task's description
    net_mean        the mean of what the hypernetwork writes for the training tasks
    net_random      from meaningless text
    base_other      the base model as it is, on text that has nothing to do with the document
    net_other       the adapter of the document, on the same text    (both: facts, people, own documents)
    recon           a hypernetwork trained by reconstruction                       (--recon DIR)

If the adapter was trained with --instruction, the prompt contains the task's definition or a description.
"""

import argparse
import random
import re
import statistics
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

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
from support import UserError, at_least, check_output, command, make_parser, read_json, say, write_file
from tasks import as_texts, benchmarks, load_tasks, summary

Scores = dict[str, float]  # {task: share of right answers}


@dataclass
class Exam:
    """Everything the methods need."""

    args: argparse.Namespace
    tasks: list[Task]
    training: list[Task]  # the split "train" of the same source, without documents
    nets: dict[str, nn.Module]  # {flag, or row of --compare: a hypernetwork}
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

    def examples(self, task: Task) -> list[Example]:
        """The test examples of a task that are asked."""
        return task.test[: self.args.n_examples or task.rules.most_examples]


# -------------------- The methods --------------------


class Given(NamedTuple):
    """A method's adapters and instructions for a task. The questions of the task use them in turn."""

    adapters: Adapter = {}  # a batch of n; {} is none
    scaling: float = 0.0
    instructions: Sequence[str] = ("",)  # before the input
    n_shots: int = 0  # examples in the prompt
    examples: Sequence[Example] = ()  # what is asked in place of the task's test examples


def by_base(exam: Exam, i: int, n_shots: int = 0) -> Given:
    return Given(instructions=instructions(exam, i, LoRAConfig()), n_shots=n_shots)


def by_prompt(exam: Exam, i: int) -> Given:
    return Given(instructions=exam.tasks[i].descriptions)


def by_mt_lora(exam: Exam, i: int) -> Given:
    adapter, config = exam.adapters["mt_lora"]
    return Given(adapter, config.scaling, instructions(exam, i, config))


def by_oracle(exam: Exam, i: int) -> Given:
    adapters, config = exam.adapters["oracles"]  # one per task
    return Given(lora.select(adapters, [i]), config.scaling, instructions(exam, i, config))


def by_net(exam: Exam, i: int, key: str = "hypernet") -> Given:
    return written(exam, i, exam.tasks[i].descriptions, key)


def by_net_reworded(exam: Exam, i: int) -> Given:
    return written(exam, i, exam.tasks[i].reworded, in_prompt=exam.tasks[i].reworded)


def by_net_shuffled(exam: Exam, i: int) -> Given:
    return written(exam, i, exam.tasks[(i + 1) % len(exam.tasks)].descriptions)  # those of the next task


def by_net_mean(exam: Exam, i: int) -> Given:
    config = exam.nets["hypernet"].config
    return Given(exam.mean, config.scaling, instructions(exam, i, config))


def by_net_random(exam: Exam, i: int) -> Given:
    return written(exam, i, exam.tasks[i].rules.meaningless or noise(random.Random(i)))


def by_base_other(exam: Exam, i: int) -> Given:
    return by_base(exam, i)._replace(examples=exam.tasks[i].other)


def by_net_other(exam: Exam, i: int) -> Given:
    return by_net(exam, i)._replace(examples=exam.tasks[i].other)


class Row(NamedTuple):
    """A method of the table."""

    function: Callable[[Exam, int], Given]  # for task i
    flag: str = ""  # the flag whose folder it needs
    needs: str = ""  # a further condition, in words
    has: Callable[[Exam], bool] = lambda exam: True  # whether this condition holds


OTHER_TEXT = ("documents with other text", lambda exam: all(task.other for task in exam.tasks))
METHODS = {
    "base": Row(by_base),
    "icl": Row(partial(by_base, n_shots=3)),
    "prompt": Row(by_prompt),
    "mt_lora": Row(by_mt_lora, "mt_lora"),
    "oracle": Row(by_oracle, "oracles"),
    "net": Row(by_net, "hypernet"),
    "net_reworded": Row(
        by_net_reworded,
        "hypernet",
        needs="tasks with descriptions in other wordings",
        has=lambda exam: all(task.reworded for task in exam.tasks),
    ),
    "net_shuffled": Row(by_net_shuffled, "hypernet", "a second task", lambda exam: len(exam.tasks) > 1),
    "net_mean": Row(by_net_mean, "hypernet", "training tasks", lambda exam: len(exam.training) > 0),
    "net_random": Row(by_net_random, "hypernet"),
    "base_other": Row(by_base_other, "", *OTHER_TEXT),
    "net_other": Row(by_net_other, "hypernet", *OTHER_TEXT),
    "recon": Row(partial(by_net, key="recon"), "recon"),
}


def written(exam: Exam, i: int, texts: Sequence[str], key: str = "hypernet", in_prompt=()) -> Given:
    """Adapters that a hypernetwork writes from texts, no more than task i has questions."""
    net, task = exam.nets[key], exam.tasks[i]
    n_texts = max(len(exam.examples(task)), task.rules.n_texts)
    adapters, _ = generate.write_adapters(net, list(texts[:n_texts]), exam.base)
    return Given(adapters, net.config.scaling, instructions(exam, i, net.config, in_prompt))


def instructions(exam: Exam, i: int, config: LoRAConfig, texts: Sequence[str] = ()) -> list[str]:
    """The instructions in the prompts of task i: empty, unless training or --instruction asks for them.

    They are the definition of the task, otherwise these texts, otherwise its descriptions.
    """
    task, asked_for = exam.tasks[i], exam.args.instruction
    has_instruction = config.instruction if asked_for is None else asked_for
    if not has_instruction or not task.rules.with_instruction:
        return [""]
    texts = [task.definition] if task.definition else texts or task.descriptions
    return [model.instruct(text) for text in texts[: len(exam.examples(task))]]


def noise(rng: random.Random) -> list[str]:
    """Text without meaning: 8 sentences of random letters."""
    sentences = []
    for _ in range(8):
        words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(12)]
        sentences.append(" ".join(words))
    return sentences


# -------------------- Questions, answers and scores --------------------


class Question(NamedTuple):
    """A test example as it is put to the base model."""

    example: Example
    adapter: int  # the place of its adapter in the batch
    prompt: str
    n_tokens: int  # of the prompt


def questions_of(exam: Exam, task: Task, given: Given) -> list[Question]:
    """The questions of a task, the shortest first. Benchmarks ask each question with several texts."""
    questions, before = [], model.turn_of(exam.tokenizer).before
    n_adapters = len(next(iter(given.adapters.values()))[0]) if given.adapters else 1
    n_texts = min(task.rules.n_texts, max(n_adapters, len(given.instructions)))
    for i, example in enumerate(exam.examples(task)):
        # one more than is needed, because the question itself may be among them
        others = [shot for shot in task.train[: given.n_shots + 1] if shot.input != example.input]
        shots = [(shot.input, shot.answers[0]) for shot in others[: given.n_shots]]
        for turn in range(i, i + n_texts):
            instruction = given.instructions[turn % len(given.instructions)]
            prompt = model.render(exam.tokenizer, example.input, instruction, shots)
            if start := task.rules.start(example):
                prompt += before + start
            n_tokens = len(model.tokenize(exam.tokenizer, prompt))
            questions.append(Question(example, turn % n_adapters, prompt, n_tokens))
    return sorted(questions, key=lambda question: question.n_tokens)


def most_tokens(exam: Exam, task: Task) -> int:
    """Maximum tokens of an answer: by default two more than the longest right answer has."""
    args, most = exam.args, task.rules.most_tokens
    if not most:
        rights = [right for example in exam.examples(task) for right in example.answers]
        most = 2 + max(len(model.tokenize(exam.tokenizer, right)) for right in rights)
    if args.contains:
        return args.max_new_tokens or max(64, most)
    return min(most, args.max_new_tokens or most)


def contains_right(example: Example, answer: str, has_ended: bool) -> bool:
    """Whether an answer contains a right one (--contains)."""
    rights = [right.strip() for right in example.answers]
    return any(right and right in answer for right in rights)


class Outcome(NamedTuple):
    """What came of the questions of a task."""

    hits: list[bool]  # of each question that was asked: whether the answer is right
    n_tokens: int  # in their prompts
    seconds: float  # without the writing of adapters
    n_too_long: int  # further questions, which were not asked


def ask(exam: Exam, task: Task, given: Given) -> Outcome:
    """Answer the questions of a task, --batch_size at a time."""
    questions, most = questions_of(exam, task, given), most_tokens(exam, task)
    window, batch_size = model.window_of(exam.base), exam.args.batch_size
    fitting = [question for question in questions if question.n_tokens + most <= window]
    hits, seconds = [], 0.0
    for start in range(0, len(fitting), batch_size):
        batch = fitting[start : start + batch_size]
        numbers = [question.adapter for question in batch]
        numbers = numbers[:1] if len(set(numbers)) == 1 else numbers  # one adapter serves all rows
        adapters = lora.select(given.adapters, numbers)  # A [batch, L, r, in]
        with lora.use(exam.base, adapters, given.scaling):
            started = time.perf_counter()
            prompts = [question.prompt for question in batch]
            answers, ended = model.answer(exam.base, exam.tokenizer, prompts, most)
            seconds += time.perf_counter() - started
        for question, answer, has_ended in zip(batch, answers, ended):
            hits.append(task.rules.is_right(question.example, answer, has_ended))
    n_tokens = sum(question.n_tokens for question in fitting)
    return Outcome(hits, n_tokens, seconds, len(questions) - len(fitting))


def score(name: str, function, exam: Exam, process: int = 0, n_processes: int = 1) -> Scores:
    """Compute and print the scores of a method. Tasks with the same name count as one (documents).

    Several processes share the tasks. The scores are the same as with one process.
    """
    outcomes = {}  # {number of a task: its outcome}
    mine = range(process, len(exam.tasks), n_processes)
    n_examples = sum(len(exam.examples(exam.tasks[i])) for i in mine)
    bar = tqdm(total=n_examples, desc=name, unit="example", leave=False, disable=process > 0)
    for i in mine:
        task, given = exam.tasks[i], function(exam, i)
        outcomes[i] = ask(exam, replace(task, test=given.examples) if given.examples else task, given)
        bar.update(len(exam.examples(task)))
    bar.close()
    if n_processes > 1:
        gathered = [None] * n_processes
        dist.all_gather_object(gathered, outcomes)
        for its_outcomes in gathered:
            outcomes |= its_outcomes

    hits_of = {}  # {name of a task: hits}
    for i, task in enumerate(exam.tasks):
        hits_of.setdefault(task.name, []).extend(outcomes[i].hits)
    scores = {task: statistics.fmean(hits) for task, hits in hits_of.items() if hits}
    n_too_long = sum(outcome.n_too_long for outcome in outcomes.values())
    if n_too_long:
        window = model.window_of(exam.base)
        say(f"{n_too_long} questions are left out, longer than the base model's window of {window}")
    if scores:
        n_asked = sum(len(outcome.hits) for outcome in outcomes.values())
        n_tokens = sum(outcome.n_tokens for outcome in outcomes.values()) / n_asked
        seconds = sum(outcome.seconds for outcome in outcomes.values()) / n_asked
        cost = f"{n_tokens:.0f} tokens in a prompt, {1000 * seconds:.0f} ms for an answer"
        say(f"{name:24} {statistics.fmean(scores.values()):.3f}   {cost}")
    return scores


# -------------------- The flags, and what they name --------------------


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--tasks", default="tiny", help="as for train.py; or benchmarks, or some of these: arc_easy,gsm8k")
    add("--split", default="test", help="which of the tasks: train, val, test, or another that they have")
    add("--n_tasks", type=at_least(0), default=0, help="use so many of them (0: all)")
    add("--n_examples", type=at_least(1), help="per task; default: 25, of benchmarks all")
    add("--methods", help="comma-separated; default: all that have what they need")
    add("--mt_lora", help="adapter folder of train.py --mode lora --multi_task")
    add("--oracles", help="folder of adapter folders, one per task, of train.py --mode lora")
    add("--recon", help="folder of train.py --mode recon")
    add("--compare", nargs="+", default=[], help="folders of further hypernetworks, each a method")
    add("--descriptions", help='JSON file {"task": ["description", ...]} to use instead')
    add("--contains", action="store_true", help="an answer is right if it contains a right answer")
    add("--run_code", action="store_true", help="run code that the model writes: no sandbox!")
    add("--batch_size", type=at_least(1), default=256, help="questions of a task that are answered at once")
    add("--max_new_tokens", type=at_least(1), help="longest answer; default: as long as the right ones need")
    add("--out", help="write settings and scores to this JSON file; extras.plot draws them")
    generate.add_model_flags(parser)
    args = parser.parse_args()
    args.methods = args.methods and args.methods.split(",")
    for name in args.methods or []:
        if name not in METHODS:
            raise UserError(f"--methods: there is no method {name!r}, but {', '.join(METHODS)}")
    args.base_model = args.base_model and model.resolve(args.base_model)
    if args.out and check_output(args.out, ".json").exists():
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
        if not task.test:
            raise UserError(f"the task {task.name} has no test part: that is the last fifth of its instances")
        if not all(example.answers for example in task.test):
            raise UserError(f"{task.name} cannot be scored: one of its questions has no answer")
        if args.contains and task.rules != data.EXACT:
            raise UserError(f"--contains is not for {task.name}, which has scores of its own")
        if args.contains:
            tasks[i] = replace(task, rules=data.EXACT._replace(is_right=contains_right))
    return tasks, [task for task in splits.get("train", []) if not task.is_document]


def load_nets(args, tasks: list[Task], device) -> dict[str, nn.Module]:
    """{flag: hypernetwork}, for --compare {row: hypernetwork}. The shipped one only if a method needs it."""
    reads = "documents" if tasks[0].is_document else "descriptions"
    folder, nets = args.hypernet, {}
    if not folder and any(METHODS[name].flag == "hypernet" for name in args.methods or METHODS):
        folder = generate.shipped_hypernet(args.base_model or model.TINY, reads)
    if folder:
        nets["hypernet"] = generate.load_net(folder, reads, device, args.encoder)
    if args.recon:
        nets["recon"] = generate.load_net(args.recon, reads, device)
        if not nets["recon"].config.recon_loss:
            raise UserError(f"--recon {args.recon}: this hypernetwork was trained by SFT")
    for folder in args.compare:
        nets[f"net of {folder}"] = generate.load_net(folder, reads, device)
    return nets


def load_adapters(args, tasks: list[Task], device) -> dict[str, tuple[Adapter, LoRAConfig]]:
    """{flag: (adapters, their config)} for the methods to run."""
    flags, adapters = [METHODS[name].flag for name in args.methods or METHODS], {}
    if args.mt_lora and "mt_lora" in flags:
        adapters["mt_lora"] = lora.load_adapters([Path(args.mt_lora)], device)
    if args.oracles and "oracles" in flags:
        there = [Path(args.oracles, task.name) for task in tasks if Path(args.oracles, task.name).is_dir()]
        if len(there) < len(tasks):
            message = f"{args.oracles} holds adapters of {len(there)} of these {len(tasks)} tasks"
            raise UserError(f"{message} (--split, --n_tasks as in training)")
        adapters["oracles"] = lora.load_adapters(there, device)
    return adapters


def methods_to_run(args, exam: Exam) -> dict[str, Callable[[Exam, int], Given]]:
    """--methods, or all that have what they need; and --compare."""
    functions, left_out = {}, []
    for name in args.methods or METHODS:
        row = METHODS[name]
        needs = row.needs
        if row.flag and row.flag not in {*exam.nets, *exam.adapters}:
            needs = f"--{row.flag} DIR"
        elif row.has(exam):
            functions[name] = row.function
            continue
        if args.methods:
            raise UserError(f"the method {name} needs {needs}")
        left_out.append(f"{name} (needs {needs})")
    for folder in args.compare:
        functions[f"net of {folder}"] = partial(by_net, key=f"net of {folder}")
    if left_out:
        say(f"left out: {', '.join(left_out)}")
    return functions


@torch.no_grad()
def main() -> None:
    args = parse_args()
    device = model.pick_device(args.device)
    process, n_processes = model.join_processes(device)
    tasks, training = tasks_to_judge(args)
    nets, adapters = load_nets(args, tasks, device), load_adapters(args, tasks, device)
    configs = [net.config for net in nets.values()] + [config for _, config in adapters.values()]
    base, tokenizer = generate.load_base_for(configs, args, device)
    for net in nets.values():
        net.connect(base, tokenizer)

    exam, results = Exam(args, tasks, training, nets, adapters, base, tokenizer), {}
    inputs = [example.input for task in tasks for example in exam.examples(task)]
    model.check_known(tokenizer, inputs)
    for name, function in methods_to_run(args, exam).items():
        scores = score(name, function, exam, process, n_processes)
        if scores:
            results[name] = scores
        if args.out and process == 0:
            write_results(Path(args.out), vars(args) | {"base_model": base.name_or_path}, results)
    say("\n" + make_table(benchmarks.beside_published(results, base.name_or_path), args.split))
    if dist.is_initialized():
        dist.destroy_process_group()


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
