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
    net_reworded    from wordings that training never used                         (tiny; chores)
    net_shuffled    from another task's description
    net_mean        the mean of what the hypernetwork writes for the training tasks
    net_random      from meaningless text
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
from support import UserError, check_output, command, make_parser, read_json, say, write_file
from tasks import as_texts, benchmarks, load_tasks, summary

Scores = dict[str, float]  # {task: share of right answers}
Texts = list[Sequence[str]]  # of each task


class Question(NamedTuple):
    """A test example as it is put to the base model."""

    index: int  # of its task
    task: str  # its name
    example: Example
    text: str  # from which its adapter is written
    prompt: str
    n_prompt: int  # tokens
    most_tokens: int  # of the answer


class Exam(NamedTuple):
    """What the methods work with."""

    tasks: list[Task]
    training: list[Task]  # the split "train" of the same source
    specs: dict[str, benchmarks.Spec]  # of benchmarks: how they ask and score
    nets: dict[str, nn.Module]  # {flag: the hypernetwork in its folder}
    adapters: dict[str, tuple[lora.Adapter, lora.LoRAConfig]]  # {flag: what its folder holds}
    base: nn.Module
    tokenizer: Any


# -------------------- The methods --------------------


class Method(NamedTuple):
    """Whose adapters answer, from which texts they are written, and what stands in the prompt."""

    adapters: Callable[[list[Question]], lora.Adapter] = lambda questions: {}  # as one batch; {} is none
    config: lora.LoRAConfig = lora.LoRAConfig()
    texts: Texts | None = None  # from which adapters are written
    in_prompt: Texts | None = None  # where training had an instruction; None: the tasks' own descriptions
    with_description: bool = False  # it stands in the prompt, whatever training did
    n_shots: int = 0  # examples in the prompt


def by_one_lora(exam: Exam) -> Method:
    adapter, config = exam.adapters["mt_lora"]
    return Method(lambda questions: adapter, config)


def by_oracles(exam: Exam) -> Method:
    adapters, config = exam.adapters["oracles"]  # one per task
    return Method(lambda questions: lora.select(adapters, [asked.index for asked in questions]), config)


def by_net(exam: Exam, flag: str = "hypernet") -> Method:
    return written(exam, exam.nets[flag], [task.descriptions for task in exam.tasks])


def by_net_reworded(exam: Exam) -> Method | None:
    texts = [task.reworded for task in exam.tasks]
    return written(exam, exam.nets["hypernet"], texts, in_prompt=texts) if all(texts) else None


def by_net_shuffled(exam: Exam) -> Method | None:
    texts = [task.descriptions for task in exam.tasks[1:] + exam.tasks[:1]]  # those of the next task
    return written(exam, exam.nets["hypernet"], texts) if len(texts) > 1 else None


def by_net_mean(exam: Exam) -> Method | None:
    """The mean of what the hypernetwork writes for the training tasks; None if there are none."""
    if not exam.training:
        return None
    net = exam.nets["hypernet"]
    mean = mean_adapter(exam.base, net, exam.training)
    return Method(lambda questions: mean, net.config)


def by_net_random(exam: Exam) -> Method:
    texts = [noise(random.Random(index)) for index in range(len(exam.tasks))]
    return written(exam, exam.nets["hypernet"], texts)


class Row(NamedTuple):
    """A method of the table."""

    function: Callable[[Exam], Method | None]  # None if it lacks what it needs
    flag: str = ""  # the flag whose folder it needs
    needs: str = ""  # what else


METHODS = {
    "base": Row(lambda exam: Method()),
    "icl": Row(lambda exam: Method(n_shots=3)),
    "prompt": Row(lambda exam: Method(with_description=True)),
    "mt_lora": Row(by_one_lora, "mt_lora"),
    "oracle": Row(by_oracles, "oracles"),
    "net": Row(by_net, "hypernet"),
    "net_reworded": Row(by_net_reworded, "hypernet", "tasks with descriptions in other wordings"),
    "net_shuffled": Row(by_net_shuffled, "hypernet", "a second task"),
    "net_mean": Row(by_net_mean, "hypernet", "training tasks with descriptions"),
    "net_random": Row(by_net_random, "hypernet"),
    "recon": Row(lambda exam: by_net(exam, "recon"), "recon"),
}


def written(exam: Exam, net: nn.Module, texts: Texts, in_prompt: Texts | None = None) -> Method:
    """The method of a hypernetwork that writes adapters from these texts."""

    def write(questions: list[Question]) -> lora.Adapter:
        distinct = list(dict.fromkeys(question.text for question in questions))
        adapters, _ = generate.write_adapters(net, distinct, exam.base)
        return lora.select(adapters, [distinct.index(question.text) for question in questions])

    return Method(write, net.config, texts, in_prompt)


def mean_adapter(base, net, tasks: list[Task]) -> lora.Adapter:
    """The mean of what a hypernetwork writes for up to 512 training tasks. A [1, L, r, in]"""
    tasks, mean = tasks[:: math.ceil(len(tasks) / 512)], {}
    for task in tasks:  # one by one, since all at once would fill the memory
        adapter, _ = generate.write_adapters(net, [task.descriptions[0]], base)
        for name, (A, B) in adapter.items():
            mean_A, mean_B = mean.get(name, (0, 0))
            mean[name] = (mean_A + A / len(tasks), mean_B + B / len(tasks))
    return mean


def noise(rng: random.Random) -> list[str]:
    """Text without meaning: 8 sentences of random letters."""
    sentences = []
    for _ in range(8):
        words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(12)]
        sentences.append(" ".join(words))
    return sentences


# -------------------- The flags, and what they name --------------------


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
    add("--max_new_tokens", type=int, help="longest answer; default: as long as the right ones need")
    add("--out", help="write settings and scores to this JSON file; extras.plot draws them")
    generate.add_model_flags(parser)
    args = parser.parse_args()
    for name in ("batch_size", "n_examples", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be above 0")
    if args.n_tasks < 0:
        raise UserError("--n_tasks must not be negative")
    if args.methods:  # (t2l is the former name of net)
        args.methods = [re.sub("^t2l", "net", name) for name in args.methods.split(",")]
        for name in args.methods:
            if name not in METHODS:
                raise UserError(f"--methods: there is no method {name!r}, but {', '.join(METHODS)}")
    args.base_model = args.base_model and model.resolve(args.base_model)
    if args.out and check_output(args.out, ".json").exists():
        content = read_json(args.out)
        if not isinstance(content, dict) or content.keys() != {"settings", "results"}:
            raise UserError(f"--out {args.out} is there already, and does not hold results of eval.py")
    return args


def tasks_to_judge(args, specs: dict[str, benchmarks.Spec]) -> tuple[list[Task], list[Task]]:
    """(the tasks of --tasks and --split, with the texts of --descriptions; those of "train")."""
    splits = benchmarks.load(list(specs)) if specs else load_tasks(args.tasks)
    say(summary(args.tasks, splits))
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


def load_nets(args, tasks: list[Task], device) -> dict[str, nn.Module]:
    """{flag: hypernetwork} for the methods to run, and {folder: hypernetwork} for --compare."""
    flags = [METHODS[name].flag for name in args.methods or METHODS]
    reads, nets = "documents" if tasks[0].is_document else "descriptions", {}
    shipped = generate.shipped_hypernet(args.base_model or model.TINY, reads)
    for flag, folder in ("hypernet", args.hypernet or shipped), ("recon", args.recon):
        if folder and flag in flags:
            nets[flag] = generate.load_net(folder, reads, args, device)
    if "recon" in nets and not nets["recon"].config.recon_loss:
        raise UserError(f"--recon {args.recon}: this hypernetwork was trained by SFT")
    for folder in args.compare:
        nets[folder if "/" in folder else f"./{folder}"] = generate.load_net(folder, reads, args, device)
    return nets


def load_adapters(args, tasks: list[Task], device) -> dict[str, tuple[lora.Adapter, lora.LoRAConfig]]:
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


def methods_to_run(args, exam: Exam) -> dict[str, Method]:
    """--methods, or all that have what they need; and --compare."""
    methods, left_out = {}, []
    for name in args.methods or METHODS:
        function, flag, needs = METHODS[name]
        method = None
        if flag and flag not in {*exam.nets, *exam.adapters}:
            needs = f"--{flag} DIR"
        else:
            method = function(exam)
        if method:
            methods[name] = method
        elif args.methods:
            raise UserError(f"the method {name} needs {needs}")
        else:
            left_out.append(f"{name} (needs {needs})")
    for folder in exam.nets:
        if "/" in folder:  # of --compare, not a flag
            methods[folder] = by_net(exam, folder)
    if left_out:
        say(f"left out: {', '.join(left_out)}")
    return methods


# -------------------- Questions, answers and scores --------------------


def questions_of(exam: Exam, method: Method, args) -> list[Question]:
    """The questions of a method: the test examples of all tasks, each with one of the texts in turn.

    Those whose prompt does not fit into the base model's window are left out. A benchmark has all examples,
    each with three texts, as published, and its inputs say what to do.
    """
    questions, n_too_long, window = [], 0, model.window_of(exam.base)
    tokenizer, before = exam.tokenizer, model.turn_of(exam.tokenizer).before
    with_instruction = method.config.instruction if args.instruction is None else args.instruction
    for index, task in enumerate(exam.tasks):
        spec, texts = exam.specs.get(task.name), method.texts[index] if method.texts else [""]
        in_prompt = method.in_prompt[index] if method.in_prompt else task.descriptions
        for i, example in enumerate(task.test[: args.n_examples or (None if spec else 25)]):
            shown, instruction = in_prompt[i % len(in_prompt)], ""
            if method.with_description:
                instruction = shown
            elif with_instruction and not spec:
                instruction = model.instruct(task.definition or shown)
            # one more than is needed, because the question itself may be among them
            others = [shot for shot in task.train[: method.n_shots + 1] if shot.input != example.input]
            shots = [(shot.input, shot.answers[0]) for shot in others[: method.n_shots]]
            asked = model.render(tokenizer, example.input, instruction, shots)
            if spec and spec.start(example):  # the answer's beginning is given
                asked += before + spec.start(example)
            n_prompt = len(model.tokenize(tokenizer, asked))
            most = most_tokens(tokenizer, example, spec, args)
            for text in texts[:3] if spec else [texts[i % len(texts)]]:
                if n_prompt + most <= window:
                    questions.append(Question(index, task.name, example, text, asked, n_prompt, most))
                else:
                    n_too_long += 1
    if n_too_long:
        say(f"{n_too_long} questions are left out, longer than the base model's window of {window}")
    model.check_known(tokenizer, [question.example.input for question in questions])

    def size(question: Question) -> tuple[int, int, int]:
        """Questions of similar size are answered together, since a batch takes as long as its longest."""
        is_document = exam.tasks[question.index].is_document
        length = len(question.text) if is_document else 0  # the rank goes by it
        return length, question.most_tokens, question.n_prompt

    return sorted(questions, key=size)


def most_tokens(tokenizer, example: Example, spec: benchmarks.Spec | None, args) -> int:
    """How long an answer may get: two tokens more than the right ones have; longer ones are wrong."""
    lengths = [len(model.tokenize(tokenizer, right)) for right in example.answers]
    most = spec.most_tokens if spec else 2 + max(lengths)
    if args.contains:
        return args.max_new_tokens or max(64, most)
    return min(most, args.max_new_tokens or most)


def is_right(example: Example, answer: str, ended: bool, contains: bool = False) -> bool:
    """Whether an answer is one of the right ones, and the model has ended it itself; or contains one."""
    rights = [right.strip() for right in example.answers]
    if contains:
        return any(right and right in answer for right in rights)
    return ended and answer.strip() in rights


def score(name: str, exam: Exam, method: Method, args, process: int = 0, n_processes: int = 1) -> Scores:
    """The scores of a method, which are printed. Documents of equal names count as one task.

    Of several processes each answers some of the batches; the scores are those of one.
    """
    questions, hits, seconds = questions_of(exam, method, args), [], 0.0
    batches = [questions[i : i + args.batch_size] for i in range(0, len(questions), args.batch_size)]
    batches = batches[process::n_processes]
    n_answers = sum(map(len, batches))
    bar = tqdm(total=n_answers, desc=name, unit="answer", leave=False, disable=process > 0)
    for batch in batches:
        prompts, most = [question.prompt for question in batch], [question.most_tokens for question in batch]
        with lora.use(exam.base, method.adapters(batch), method.config.scaling):
            started = time.perf_counter()  # without the writing of adapters
            answers, ended = model.answer(exam.base, exam.tokenizer, prompts, most)
            seconds += time.perf_counter() - started
        for question, answer, has_ended in zip(batch, answers, ended):
            spec = exam.specs.get(question.task)
            if spec:
                hits.append((question.task, spec.metric(question.example, answer)))
            else:
                hits.append((question.task, is_right(question.example, answer, has_ended, args.contains)))
        bar.update(len(batch))
    bar.close()
    if n_processes > 1:
        gathered = [None] * n_processes
        dist.all_gather_object(gathered, (hits, seconds))
        hits = [hit for its_hits, _ in gathered for hit in its_hits]
        seconds = sum(its_seconds for _, its_seconds in gathered)
    hits_of = {}
    for task, hit in hits:
        hits_of.setdefault(task, []).append(hit)
    scores = {task: statistics.fmean(its_hits) for task, its_hits in hits_of.items()}
    if scores:
        n_tokens = statistics.fmean(question.n_prompt for question in questions)
        cost = f"{n_tokens:.0f} tokens in a prompt, {1000 * seconds / len(questions):.0f} ms for an answer"
        say(f"{name:24} {statistics.fmean(scores.values()):.3f}   {cost}")
    return scores


@torch.no_grad()
def main() -> None:
    args = parse_args()
    device = model.pick_device(args.device)
    process, n_processes = model.join_processes(device)
    specs = benchmarks.specs_of(args.tasks, args.run_code)
    if args.contains and specs:
        raise UserError("--contains is not for benchmarks, which have scores of their own")
    tasks, training = tasks_to_judge(args, specs)
    nets, adapters = load_nets(args, tasks, device), load_adapters(args, tasks, device)
    configs = [net.config for net in nets.values()] + [config for _, config in adapters.values()]
    base, tokenizer = generate.load_base_for(configs, args, device)
    for net in nets.values():
        net.connect(base, tokenizer)

    exam, results = Exam(tasks, training, specs, nets, adapters, base, tokenizer), {}
    for name, method in methods_to_run(args, exam).items():
        scores = score(name, exam, method, args, process, n_processes)
        if scores:
            results[name] = scores
        if args.out and process == 0:
            write_results(Path(args.out), vars(args) | {"base_model": base.name_or_path}, results)
    if specs:
        results = benchmarks.beside_published(results, base.name_or_path)
    say("\n" + make_table(results, args.split))
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
