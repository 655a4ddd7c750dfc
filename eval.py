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
import statistics
import string
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import data
import generate
import lora
import model
from data import Example, Task
from support import flags, hub, processes, templates
from support.files import UserError, check_name, command, write_file
from support.tables import Scores, make_table
from tasks import benchmarks, checks

# -------------------- Where adapters come from --------------------


class Question(NamedTuple):
    """One example to be answered."""

    task: Task
    example: Example
    description: str  # from which the adapter is written
    instruction: str  # stands in the prompt before the input
    shots: list[tuple[str, str]]


# A source of adapters is a class that is made from (folder, tasks, args, device), with
#     config                     the LoRAConfig of its adapters
#     net                        a hypernetwork that is to be connected with the base model, or None
#     adapters(base, questions)  the adapters with which these questions are answered, as one batch


class OneAdapter:
    """An adapter that answers all questions."""

    net = None

    def __init__(self, folder: str, tasks: list[Task], args, device):
        self.adapter, self.config = lora.load_adapters([Path(folder)], device)

    def adapters(self, base, questions: list[Question]) -> lora.Adapter:
        return self.adapter


class Oracles:
    """An adapter for each task."""

    net = None

    def __init__(self, folder: str, tasks: list[Task], args, device):
        self.names = [task.name for task in tasks]
        existing = [name for name in self.names if Path(folder, name).is_dir()]
        if len(existing) < len(self.names):
            found = f"{folder} holds adapters of {len(existing)} of these {len(self.names)} tasks"
            advice = f"; --n_tasks {len(existing)} takes the first ones, as in training" if existing else ""
            raise UserError(found + advice)
        self.bank, self.config = lora.load_adapters([Path(folder, name) for name in self.names], device)

    def adapters(self, base, questions: list[Question]) -> lora.Adapter:
        return lora.select(self.bank, [self.names.index(question.task.name) for question in questions])


class Written:
    """A hypernetwork that writes an adapter for each description."""

    def __init__(self, folder: str, tasks: list[Task], args, device):
        self.net = generate.load_net(folder, what_is_read(tasks), args, device, "a hypernetwork")
        self.config = self.net.config

    def adapters(self, base, questions: list[Question]) -> lora.Adapter:
        texts = list(dict.fromkeys(question.description for question in questions))  # each is read once
        written, _ = generate.write_adapters(self.net, texts, base)
        return lora.select(written, [texts.index(question.description) for question in questions])


class MeanWritten(Written):
    """The mean of what a hypernetwork writes for up to 512 training tasks: one adapter for all questions."""

    def __init__(self, folder: str, tasks: list[Task], args, device):
        super().__init__(folder, tasks, args, device)
        step = math.ceil(len(args.training_tasks) / 512)
        self.texts, self.mean = [task.descriptions[0] for task in args.training_tasks[::step]], {}

    def adapters(self, base, questions: list[Question]) -> lora.Adapter:
        """The mean, which is made for the first questions."""
        if not self.mean:
            for text in self.texts:  # one by one, since all at once would fill the memory
                written, _ = generate.write_adapters(self.net, [text], base)
                for name, pair in written.items():
                    parts = [matrix / len(self.texts) for matrix in pair]
                    self.mean[name] = [a + b for a, b in zip(self.mean.get(name, [0, 0]), parts)]
        return self.mean


def what_is_read(tasks: list[Task]) -> str:
    return "documents" if tasks[0].is_document else "descriptions"


# -------------------- The methods --------------------


def own(tasks: list[Task], t: int) -> Sequence[str]:
    """The descriptions of task t."""
    return tasks[t].descriptions


def reworded(tasks: list[Task], t: int) -> Sequence[str]:
    return tasks[t].reworded


def of_next_task(tasks: list[Task], t: int) -> list[str]:
    return tasks[(t + 1) % len(tasks)].descriptions if len(tasks) > 1 else []


def noise(tasks: list[Task], t: int) -> list[str]:
    """Text without meaning: 8 sentences of random letters."""
    rng = random.Random(t)
    sentences = []
    for _ in range(8):
        words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(12)]
        sentences.append(" ".join(words))
    return sentences


class Method(NamedTuple):
    """Whose adapter answers, from which descriptions it is written, and what stands in the prompt.

    A source without a folder has no flag.
    """

    source: type | None = None  # one of the classes above; None is no adapter
    flag: str = ""  # which names the source's folder
    descriptions: Callable[[list[Task], int], Sequence[str]] = own  # [] if a task has none
    instruction_from: Callable[[list[Task], int], Sequence[str]] = own  # if prompts have an instruction
    with_description: bool = False  # it stands in the prompt, whatever training did
    n_shots: int = 0  # examples in the prompt
    of_training: bool = False  # needs the training tasks
    folder: str = ""  # in place of the flag, for --compare

    def folder_in(self, args, tasks: list[Task]) -> str:
        """The folder of the source. Raises UserError if there is none."""
        folder = self.folder or getattr(args, self.flag, "")
        if not folder and self.flag == "hypernet":
            folder = str(hub.shipped_hypernet(args.base_model or "tiny", what_is_read(tasks)))
        if not folder and self.flag:
            raise UserError(f"needs --{self.flag} DIR")
        return folder


METHODS = {
    "base": Method(),
    "icl": Method(n_shots=3),
    "prompt": Method(with_description=True),
    "mt_lora": Method(OneAdapter, "mt_lora"),
    "oracle": Method(Oracles, "oracles"),
    "t2l": Method(Written, "hypernet"),
    "t2l_reworded": Method(Written, "hypernet", reworded, instruction_from=reworded),
    "t2l_shuffled": Method(Written, "hypernet", of_next_task),
    "t2l_mean": Method(MeanWritten, "hypernet", of_training=True),
    "t2l_random": Method(Written, "hypernet", noise),
    "recon": Method(Written, "recon"),
}


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--tasks", default="tiny", help="as for train.py; or benchmarks, or some of these: arc_easy,gsm8k")
    add("--split", default="test", help="which of the tasks: train, val, test, or another that they have")
    add("--n_tasks", type=flags.at_least(0), default=0, help="use so many of them (0: all)")
    add("--n_examples", type=flags.at_least(1), help="per task; default: 25, of benchmarks all")
    add("--methods", help="comma-separated; default: all that have what they need")
    add("--mt_lora", help="adapter folder of train.py --mode lora --multi_task")
    add("--oracles", help="folder of adapter folders, one per task, of train.py --mode lora")
    add("--recon", help="folder of train.py --mode recon")
    add("--compare", nargs="+", default=[], help="folders of further hypernetworks, each a method")
    add("--descriptions", help='JSON file {"task": ["description", ...]} to use instead')
    add("--contains", action="store_true", help="an answer is right if it contains a right answer")
    add("--run_code", action="store_true", help="run code that the model writes: no sandbox!")
    add("--batch_size", type=flags.at_least(1), default=256, help="inputs that are answered at once")
    add("--out", help="write settings and scores to this JSON file; extras.plot draws them")
    generate.add_model_flags(parser)
    args = parser.parse_args()
    if args.out:
        check_name(Path(args.out), ".json")
    return args


def choose_methods(args, tasks: list[Task]) -> dict[str, Method]:
    """Those of --methods, or all that have what they need; and those of --compare."""
    chosen, left_out = {}, []
    for name in METHODS if args.methods is None else args.methods.split(","):
        if name not in METHODS:
            raise UserError(f"--methods: there is no method {name!r}, but {', '.join(METHODS)}")
        lacks = what_is_missing(METHODS[name], args, tasks)
        if lacks and args.methods:
            raise UserError(f"the method {name} {lacks}")
        if lacks:
            left_out.append(f"{name} ({lacks})")
        else:
            chosen[name] = METHODS[name]
    for folder in args.compare:
        label = folder if "/" in folder else f"./{folder}"  # which no method is called
        chosen[label] = Method(Written, folder=folder)
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    return chosen


def what_is_missing(method: Method, args, tasks: list[Task]) -> str:
    """What a method needs and does not have; "" if it has all."""
    try:
        method.folder_in(args, tasks)
    except UserError as e:
        return str(e)
    if method.of_training and not args.training_tasks:
        return "needs descriptions of training tasks"
    has_texts = all(method.descriptions(tasks, t) for t in range(len(tasks)))
    return "" if has_texts else "needs descriptions that these tasks do not have, or a second task"


class Models:
    """The base model, and the source of each method's adapters."""

    def __init__(self, args, methods: dict[str, Method], tasks: list[Task], device):
        self.sources, loaded = {}, {}  # {name of a method: source}, {(class, folder): source}
        for name, method in methods.items():
            if method.source:
                key = (method.source, method.folder_in(args, tasks))
                if key not in loaded:
                    loaded[key] = method.source(key[1], tasks, args, device)
                self.sources[name] = loaded[key]
        # hypernetworks go first: they record the base model by its name
        sources = sorted(loaded.values(), key=lambda source: source.net is None)
        configs = [source.config for source in sources]
        self.base_model = args.base_model or (configs[0].base_model if configs else "tiny")
        self.base, self.tokenizer = generate.load_base_for(configs, args, device)
        for source in loaded.values():
            if source.net:
                source.net.connect(self.base, self.tokenizer)

    def has_instruction(self, name: str, args) -> bool:
        """Whether the instruction stands in a method's prompts: as a flag says, or as in training."""
        if args.instruction is not None:
            return args.instruction
        return name in self.sources and self.sources[name].config.instruction

    def use_adapters(self, name: str, questions: list[Question]):
        """A block in which these questions have the adapters of a method."""
        if name not in self.sources:
            return nullcontext()
        source = self.sources[name]
        return lora.use(self.base, source.adapters(self.base, questions), source.config.scaling)


# -------------------- Scores --------------------


class Asked(NamedTuple):
    """A question as it is put to the base model."""

    question: Question
    prompt: str
    n_prompt: int  # its tokens
    n_tokens: int  # of the longest answer
    size: tuple[int, int, int]  # those of similar size are answered together


def make_questions(tasks: list[Task], method: Method, with_instruction: bool, args) -> list[Question]:
    """All test examples, each with one of the descriptions in turn, or with as many as the task says."""
    questions = []
    for t, task in enumerate(tasks):
        descriptions = method.descriptions(tasks, t)
        instruction_texts = method.instruction_from(tasks, t)
        for i, example in enumerate(task.test[: args.n_examples or task.n_scored]):
            text, instruction = instruction_texts[i % len(instruction_texts)], ""
            if method.with_description:
                instruction = text
            elif with_instruction and task.has_instruction:
                instruction = model.instruct(task.definition or text)
            # one more than is needed, because the question itself may be among them
            others = [shot for shot in task.train[: method.n_shots + 1] if shot.input != example.input]
            shots = [(shot.input, shot.answers[0]) for shot in others[: method.n_shots]]
            used = [descriptions[i % len(descriptions)]]
            if method.source is Written and task.n_descriptions > 1:
                used = descriptions[: task.n_descriptions]
            for description in used:
                questions.append(Question(task, example, description, instruction, shots))
    return questions


def score(models: Models, tasks: list[Task], name: str, method: Method, args) -> Scores:
    """The scores of one method, which are printed. Documents of equal names count as one task.

    Questions whose prompt does not fit into the base model's window are left out.
    """
    tokenizer = models.tokenizer
    window = hub.window_of(models.base)
    asked, n_too_long = [], 0
    for question in make_questions(tasks, method, models.has_instruction(name, args), args):
        chat = model.chat(tokenizer, question.example.input, question.instruction, question.shots)
        prompt = model.render(tokenizer, chat) + question.task.start(question.example)
        n_prompt, n_tokens = len(model.tokenize(tokenizer, prompt)), answer_tokens(tokenizer, question, args)
        if n_prompt + n_tokens <= window:
            length = len(question.description) if question.task.is_document else 0  # the rank goes by it
            asked.append(Asked(question, prompt, n_prompt, n_tokens, (length, n_tokens, len(prompt))))
        else:
            n_too_long += 1
    if n_too_long:
        print(f"{name}: {n_too_long} questions are left out, longer than the base model's window of {window}")
    templates.check_known(tokenizer, [row.question.example.input for row in asked])
    asked.sort(key=lambda row: row.size)  # a batch takes as long as the longest of it

    hits, seconds = {}, 0.0
    bar = tqdm(total=len(asked), desc=name, unit="answer", leave=False)
    for i in range(0, len(asked), args.batch_size):
        batch = asked[i : i + args.batch_size]
        n_tokens = max(row.n_tokens for row in batch)
        with models.use_adapters(name, [row.question for row in batch]):
            started = time.perf_counter()  # without the writing of adapters
            answers = model.answer(models.base, tokenizer, [row.prompt for row in batch], n_tokens)
            seconds += time.perf_counter() - started
        for row, answer in zip(batch, answers):
            question = row.question
            is_right = question.task.metric(question.example, answer)
            if args.contains and question.task.metric is data.exact_match:
                rights = [right.strip() for right in question.example.answers]
                is_right = any(right and right in answer for right in rights)
            hits.setdefault(question.task.name, []).append(is_right)
        bar.update(len(batch))
    bar.close()
    scores = {task: statistics.fmean(its_hits) for task, its_hits in hits.items()}
    if asked:
        mean_prompt = statistics.fmean(row.n_prompt for row in asked)
        cost = f"{mean_prompt:.0f} tokens in a prompt, {1000 * seconds / len(asked):.0f} ms for an answer"
        print(f"{name:24} {statistics.fmean(scores.values()):.3f}   {cost}", flush=True)
    return scores


def answer_tokens(tokenizer, question: Question, args) -> int:
    """How long an answer may get."""
    if args.contains and question.task.metric is data.exact_match:
        return args.max_new_tokens or 64
    longest = question.task.answer_tokens
    if not longest:  # two more than the right one has: a longer answer is wrong anyway
        longest = 2 + max(len(model.tokenize(tokenizer, right)) for right in question.example.answers)
    return min(args.max_new_tokens or longest, longest)


def main() -> None:
    args = parse_args()
    device = processes.start_single(args.device)
    benchmark_names = benchmarks.names_in(args.tasks, args.run_code)
    tasks = checks.choose_scored(args, benchmark_names)
    methods = choose_methods(args, tasks)
    models = Models(args, methods, tasks, device)
    results, settings = {}, vars(args) | {"base_model": models.base_model}
    del settings["training_tasks"]
    write_results(args.out, settings, results)
    for name, method in methods.items():
        scores = score(models, tasks, name, method, args)
        if scores:
            results[name] = scores
            write_results(args.out, settings, results)
    if benchmark_names:
        results = benchmarks.beside_published(results, hub.preset_of(models.base_model))
    print("\n" + make_table(results, args.split))


def write_results(out: str | None, settings: dict, results: dict[str, Scores]) -> None:
    """Write --out: before the first method, to find out early whether it can be written, and after each."""
    content = {}
    for name, scores in results.items():
        content[name] = {"mean": statistics.fmean(scores.values()), "per_task": scores}
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(out), {"settings": settings, "results": content})


if __name__ == "__main__":
    command(main)
