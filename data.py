"""Tasks: what a hypernetwork is trained on and judged by.

A task is a name, descriptions of it in words, and examples (input, right answers). Tasks come from a folder
of JSON files (the format of Natural Instructions) or from the built-in tiny world: 512 tasks on lists of four
everyday words, such as "keep the animals, translate them into French, reverse the order". A document is a
task, too: its text is the description, and its examples are questions about it.
"""

import json
import math
import os
import random
import re
import time
from dataclasses import dataclass, field
from functools import lru_cache
from http.client import HTTPException
from itertools import product
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

from tqdm import tqdm

import model
from lora import UserError, read, write

ASSETS = Path(__file__).parent / "assets"
Example = tuple[str, list[str]]  # input, right answers; the first of them is the one to learn

@dataclass
class Task:
    """One task."""

    name: str
    descriptions: list[str]  # of a document: its text
    train: list[Example]
    test: list[Example]
    reworded: list[str] = field(default_factory=list)  # in wordings that no training description uses
    definition: str = ""  # the instruction of Natural Instructions, if there is one
    kind: str = "equal"  # how an answer is scored, see eval.py
    start: str = ""  # how the answer starts, if it is given

    def texts(self) -> list[str]:
        """All that the base model has to read and write in training."""
        return [text for question, answers in self.train for text in (question, answers[0])]

def load_tasks(source: str) -> dict[str, list[Task]]:
    """{"train": [...], "val": [...], "test": [...]} of a built-in source, or of a folder of task files."""
    names = BENCHMARKS if source == "benchmarks" else str(source).split(",")
    if set(names) <= set(BENCHMARKS):
        return {"train": [], "val": [], "test": [benchmark(name) for name in names]}
    return SOURCES[source]() if source in SOURCES else folder_tasks(source)

def pick(tasks: dict[str, list[Task]], split: str, n_tasks: int | None = None) -> list[Task]:
    """The first n tasks of a split in one fixed shuffled order, so that fewer tasks are a subset of more."""
    if not tasks.get(split):
        raise UserError(f"these tasks have no split {split}, but {', '.join(k for k in tasks if tasks[k])}")
    chosen = list(tasks[split])
    random.Random(0).shuffle(chosen)
    return chosen[:n_tasks]

# -------------------- The batch of a training step --------------------

Batch = list[tuple[int, str, list[Example]]]  # (index of a task, one of its descriptions, some examples)

def draw(tasks: list[Task], step: int, args) -> Batch:
    """The batch of a step: --tasks_per_batch tasks (None: all), and --examples_per_task of each."""
    rng = random.Random(f"{args.seed} {step}")
    some = lambda of, k: rng.sample(of, k) if k <= len(of) else rng.choices(of, k=k)
    chosen = range(len(tasks))
    if args.short_first:  # a third at first, all from half-way on
        chosen = chosen[: math.ceil(len(chosen) * min(1, 1 / 3 + 4 / 3 * step / args.max_steps))]
    if args.tasks_per_batch:
        chosen = some(chosen, args.tasks_per_batch)
    some_of = lambda task: (rng.choice(task.descriptions), some(task.train, args.examples_per_task))
    return [(i, *some_of(tasks[i])) for i in chosen]

class Row(NamedTuple):
    """One example as token ids."""

    k: int  # its task's index in the batch, and so that of its adapter
    prompt: list[int]
    answer: list[int]  # with the end mark
    teacher_prompt: list[int]  # with the document in it

@lru_cache(2**16)
def example_ids(tokenizer, question: str, answer: str, before: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its answer."""
    messages = model.prompt(tokenizer, question, before)
    prompt, target = model.render(tokenizer, messages), model.render(tokenizer, messages, answer)
    return model.tokenize(tokenizer, prompt), model.tokenize(tokenizer, target)

def make_rows(tokenizer, tasks: list[Task], batch: Batch, args) -> list[Row]:
    """The examples of a batch, the shortest first; those over max_tokens are left out."""
    rows = []
    for k, (i, description, examples) in enumerate(batch):
        instruction = (tasks[i].definition or description) + model.SUFFIX if args.instruction else ""
        for question, answers in examples:
            prompt, answer = example_ids(tokenizer, question, answers[0], instruction)
            teacher = example_ids(tokenizer, question, answers[0], description)[0] if args.distill else []
            rows.append(Row(k, prompt, answer, teacher))
    rows.sort(key=lambda row: len(row.prompt) + len(row.answer))
    return [row for row in rows if len(row.prompt) + len(row.answer) <= args.max_tokens] or rows[:1]

# -------------------- A folder of task files --------------------

def folder_tasks(folder: str | Path) -> dict[str, list[Task]]:
    """Read NAME.json files, split as splits.json says; without it all are training tasks."""
    folder = Path(folder)
    files = sorted(p for p in folder.glob("*.json") if p.name != "splits.json")
    if not files:
        raise UserError(f"--tasks {folder}: neither {', '.join(SOURCES)} nor a folder of NAME.json files")
    file = folder / "splits.json"
    splits = read(file) if file.exists() else {"train": [p.stem for p in files]}
    read_tasks = lambda names: [read_task(folder / f"{name}.json") for name in names]
    return {split: read_tasks(splits.get(split, [])) for split in ("train", "val", "test")}

def read_task(path: Path) -> Task:
    """One file: {"name", "descriptions" or "Definition", "Instances": [{"input", "output": [...]}]}, of which
    the last fifth is the test part; or {"document", "questions": [{"question", "answer" if known}]}."""
    content = read(path)
    as_list = lambda text: [text] if isinstance(text, str) else list(text)
    try:
        if "document" in content:
            descriptions, definition = [content["document"]], ""
            train = [(x["question"].strip(), as_list(x.get("answer", []))) for x in content["questions"]]
            test = train  # to be scored on the same questions
        else:
            descriptions = as_list(content.get("descriptions") or content["Definition"])
            definition = as_list(content.get("Definition") or [""])[0]
            strip = lambda texts: [text.strip() for text in as_list(texts)]
            examples = [(x["input"].strip(), strip(x["output"])) for x in content["Instances"]]
            n_train = len(examples) - len(examples) // 5
            train, test = examples[:n_train], examples[n_train:]
    except (AttributeError, KeyError, IndexError, TypeError) as e:
        raise UserError(f"{path} is not a task file: {e!r}") from None
    answered = "document" in content or all(answers for _, answers in train + test)
    if not train or not all(d.strip() for d in descriptions) or not answered:
        raise UserError(f"{path} is not a task file: it lacks descriptions (or a document) or answers")
    return Task(content.get("name", path.stem), descriptions, train, test, definition=definition)

NATURAL_INSTRUCTIONS = "https://raw.githubusercontent.com/allenai/natural-instructions/master/tasks"

def cache_folder(name: str) -> Path:
    """The folder for downloads."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text-to-lora" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder

def download(url: str, what: str):
    """The JSON at a URL; waits if the server asks for it (HTTP 429). `what` says what is missing else."""
    for wait in (1, 2, 4, 8, 0):
        try:
            with urlopen(url, timeout=60) as response:
                return json.loads(response.read())
        except (OSError, HTTPException, ValueError) as e:
            if not (isinstance(e, HTTPError) and e.code == 429 and wait):
                raise UserError(f"{what}, and {url} cannot be read: {e or type(e).__name__}") from None
            time.sleep(float(e.headers.get("Retry-After") or wait))

def lots_of_loras() -> dict[str, list[Task]]:
    """The paper's 479 training tasks and 11 validation tasks, from Natural Instructions. Downloads what is
    not in the cache, so a later call continues an interrupted one."""
    folder, splits = cache_folder("lots-of-loras"), read(ASSETS / "lots_of_loras.json")
    names = [name for split in splits.values() for name in split]
    missing = [name for name in names if not (folder / f"{name}.json").exists()]
    write(folder / "splits.json", splits)
    for i, name in enumerate(tqdm(missing, desc="Natural Instructions", unit="file", disable=not missing)):
        what = f"--tasks lots-of-loras: {len(missing) - i} of {len(names)} task files are not in {folder}"
        write(folder / f"{name}.json", download(f"{NATURAL_INSTRUCTIONS}/{name}.json", what))
    return folder_tasks(folder)

def shown_inputs(base_model: str, description: str) -> list[str]:
    """Inputs to show an adapter on: of the kind that the description names most, from examples.json in the
    folder of what is shipped for this base model."""
    path = Path(model.TINY).parent / model.preset_name(base_model) / "examples.json"
    kinds = read(path) if path.exists() else [{"words": [], "inputs": []}]
    named = lambda kind: sum(bool(re.search(rf"\b{word}", description.lower())) for word in kind["words"])
    return max(kinds, key=named)["inputs"]  # the first kind if it names none

# -------------------- The paper's ten benchmarks --------------------

ROWS_SERVICE = "https://datasets-server.huggingface.co/rows"
BENCHMARKS = {  # name: (dataset, config, split, its rows, kind of answer, how an answer starts)
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", 1172, "first", ""),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", 2376, "first", ""),
    "boolq": ("google/boolq", "default", "validation", 3270, "truth", ""),
    "gsm8k": ("openai/gsm8k", "main", "test", 1319, "number", "Let's think step by step."),
    "hellaswag": ("Rowan/hellaswag", "default", "validation", 10042, "first", ""),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval", "test", 164, "code", "```python\n"),
    "mbpp": ("google-research-datasets/mbpp", "full", "test", 500, "code", "```python\n"),  # paper: 399
    "openbookqa": ("allenai/openbookqa", "main", "test", 500, "first", ""),
    "piqa": ("ybisk/piqa", "plain_text", "validation", 1838, "first", ""),
    "winogrande": ("allenai/winogrande", "winogrande_debiased", "validation", 1267, "first", ""),
}

def benchmark_example(name: str, row: dict) -> tuple[str, list[str], str]:
    """A row of a benchmark's dataset as (input, right answers, answer to show). Of code the right answers are
    the tests, and the head of the function."""
    lettered = lambda c: "\n".join(f"{label}. {text}" for label, text in zip(c["label"], c["text"]))
    numbered = lambda texts, first: "\n".join(f"{i}. {text}" for i, text in enumerate(texts, first))
    choose = lambda text, choices, what, right: (
        f"{text}\n\n{choices}\n\nAnswer with the {what} of the right choice only.", [str(right)], str(right)
    )
    if name in ("arc_challenge", "arc_easy", "openbookqa"):
        question = row.get("question") or row["question_stem"]
        return choose(question, lettered(row["choices"]), "letter", row["answerKey"])
    if name == "hellaswag":
        return choose(row["ctx"], numbered(row["endings"], 0), "number", row["label"])
    if name == "piqa":
        return choose(row["goal"], numbered([row["sol1"], row["sol2"]], 0), "number", row["label"])
    if name == "winogrande":
        return choose(row["sentence"], numbered([row["option1"], row["option2"]], 1), "number", row["answer"])
    if name == "boolq":
        right = str(row["answer"]).lower()
        return f"{row['passage']}\n\n{row['question']}?\n\nAnswer with true or false only.", [right], right
    if name == "gsm8k":
        steps, right = row["answer"].split("####")
        return row["question"], [right.strip()], f"{steps}The answer is {right.strip()}."
    if name == "humaneval":
        head, tests = row["prompt"], f"{row['test']}\ncheck({row['entry_point']})"
        shown = f"```python\n{head}{row['canonical_solution']}```"
        return f"Complete this Python function.\n\n```python\n{head}```", [tests, head], shown
    tests = "\n".join([row.get("test_setup_code") or "", *row["test_list"]])
    asked = f"{row['text']}\nThe code should pass this test:\n{row['test_list'][0]}"
    return asked, [tests, ""], f"```python\n{row['code']}\n```"

def benchmark(name: str) -> Task:
    """One benchmark, downloaded once in pages of 100 rows; a later call continues an interrupted download."""
    dataset, config, split, n, kind, start = BENCHMARKS[name]
    folder, rows = cache_folder(f"benchmarks/{name}"), []
    for offset in tqdm(range(0, n, 100), desc=name, unit="page", leave=False):
        page = folder / f"{offset}.json"
        if not page.exists():
            where = dict(dataset=dataset, config=config, split=split, offset=offset, length=100)
            what = f"--tasks {name}: rows {offset} to {min(n, offset + 100)} of {n} are not in {folder}"
            got = download(f"{ROWS_SERVICE}?{urlencode(where)}", what)
            if got["num_rows_total"] != n or len(got["rows"]) != min(100, n - offset):
                raise UserError(f"{what}; {dataset} sent {len(got['rows'])} of {got['num_rows_total']} rows")
            write(page, got)
        rows += [entry["row"] for entry in read(page)["rows"]]
    random.Random(0).shuffle(rows)
    examples = [benchmark_example(name, row) for row in rows]
    descriptions = read(ASSETS / "benchmarks.json")["descriptions"][name]
    shots = [(question, [shown]) for question, _, shown in examples[-4:]]
    return Task(name, descriptions, shots, [(q, right) for q, right, _ in examples], kind=kind, start=start)

# -------------------- The tiny world --------------------
#
# A task keeps the words of one category (or all), changes each of them, and lays the answer out: (filter,
# map, layout). Words and phrases are in assets/tiny_world.json. The phrases that are "seen" make the training
# descriptions; the "withheld" ones make the reworded descriptions, for testing only.

WORLD = read(ASSETS / "tiny_world.json")
CATEGORIES = {category: [entry[0] for entry in entries] for category, entries in WORLD["words"].items()}
MAPS = ("same", "plural", "french", "spanish", "german", "italian", "capitals", "initial")
FORMS = {  # {"cat": {"same": "cat", "plural": "cats", "french": "chat", ...}}
    entry[0]: dict(zip(MAPS, (*entry, entry[0].upper(), entry[0][0])))
    for entries in WORLD["words"].values()
    for entry in entries
}
FILTERS = ("all", *CATEGORIES)
LAYOUTS = {
    "in_order": lambda words: words,
    "reversed": lambda words: words[::-1],
    "first": lambda words: words[:1],
    "last": lambda words: words[-1:],
    "exclaimed": lambda words: [*words, "!"],
    "joined": lambda words: " and ".join(words).split(),
    "numbered": lambda words: [x for i, word in enumerate(words, 1) for x in (f"{i}.", word)],
    "counted": lambda words: [*words, f"({len(words)})"],
}
VOCABULARY = ["<pad>", "<eos>", "<unk>", "->", "!", "and", "1.", "2.", "3.", "4.", "(1)", "(2)", "(3)", "(4)"]
VOCABULARY += dict.fromkeys(form for forms in FORMS.values() for form in forms.values())
Parts = tuple[str, str, str]  # filter, map, layout

def tiny_example(parts: Parts, rng: random.Random, n_words: int = 4) -> Example:
    """A list of words and the right answer.

    The words are of two categories, mixed at random whatever the task, so a list does not give its task away.
    """
    chosen, change, layout = parts
    categories = rng.sample(list(CATEGORIES), 2)
    if chosen not in ("all", *categories):
        categories[0] = chosen
    kept = []
    while not kept:
        words = rng.sample([word for category in categories for word in CATEGORIES[category]], n_words)
        kept = [word for word in words if chosen == "all" or word in CATEGORIES[chosen]]
    return " ".join(words), [" ".join(LAYOUTS[layout]([FORMS[word][change] for word in kept]))]

def describe(parts: Parts, rng: random.Random, reworded: bool = False) -> str:
    """One sentence that says what a tiny task is; `reworded` uses withheld phrases and frames only."""
    text = nested(parts, rng) if not reworded and rng.random() < 1 / 3 else listed(parts, rng, reworded)
    return text[0].upper() + text[1:]

def say(part: str, style: str, rng: random.Random, reworded: bool = False, x: str = "") -> str:
    """One way to say a part of a task: as an instruction, a phrase, or a noun or verb phrase around x."""
    general = part if part in WORLD["say"] else "category" if part in CATEGORIES else "language"
    names = WORLD["names"].get(part, [""])
    phrase = rng.choice(WORLD["say"][general][style]["withheld" if reworded else "seen"])
    return phrase.format(c=rng.choice(names), l=names[0], x=x)

def unsaid(parts, rng: random.Random) -> set[str]:
    """The parts that a sentence leaves out, because one would expect them anyway."""
    return {part for part in parts if part in ("all", "same", "in_order") and rng.random() < 0.4}

def listed(parts: Parts, rng: random.Random, reworded: bool) -> str:
    """One part after another: "First keep the fruits, then number them, then translate them into French." """
    style = "phrase" if rng.random() < 0.5 else "instruction"
    frame = rng.choice(WORLD["frames"][style]["withheld" if reworded else "seen"])
    said = {letter: say(part, style, rng, reworded) for letter, part in zip("fml", parts)}
    drop = unsaid(parts[1:] if style == "phrase" else parts, rng)
    dropped = [letter for letter, part in zip("fml", parts) if part in drop]
    words = [said[letter] for letter in frame["order"] if letter not in dropped] or [said["m"]]
    last = frame["last"] if len(words) > 1 else ""
    return frame["start"] + frame["between"].join(words[:-1]) + last + words[-1] + frame["end"]

def nested(parts: Parts, rng: random.Random) -> str:
    """One part inside another: "Number the French words for the fruits." """
    chosen, change, layout = parts
    drop = unsaid(parts[1:], rng)
    around = [part for part in rng.sample([change, layout], 2) if part not in drop]
    x = say(chosen, "phrase", rng)
    if around == [layout, change] and layout in ("first", "last") and rng.random() < 0.5:
        end = rng.choice(("last", "final") if layout == "last" else ("first", "earliest"))
        x = rng.choice(WORLD["ends"]).format(end=end, one=rng.choice(WORLD["one"][chosen]))
        around = [change]
    if len(around) == 2 and rng.random() < 1 / 3:
        if rng.random() < 0.5:
            more = rng.choice((", ", " - ")) + say(around[1], "phrase", rng)
        else:
            more = rng.choice((" and ", ", then ", ". Then ")) + say(around[1], "instruction", rng)
        return rng.choice(WORLD["verb_openings"]) + say(around[0], "verb", rng, x=x) + more + "."
    *inner, outer = around or ["same"]
    for part in inner:
        x = say(part, "noun", rng, x=x)
    if rng.random() < 0.5:
        return rng.choice(WORLD["noun_openings"]) + say(outer, "noun", rng, x=x) + "."
    return rng.choice(WORLD["verb_openings"]) + say(outer, "verb", rng, x=x) + "."

def tiny_splits() -> dict[str, list[Parts]]:
    """The 512 tasks as (filter, map, layout): 479 to train on, 8 to validate, 25 to test."""
    parts = list(product(FILTERS, MAPS, LAYOUTS))
    random.Random(2506_06105).shuffle(parts)
    return {"test": parts[:25], "val": parts[25:33], "train": parts[33:]}

def tiny_task(parts: Parts) -> Task:
    """The task as data, the same every time: 128 descriptions, as published, and 100 + 25 examples."""
    rng = random.Random("-".join(parts))
    examples = [tiny_example(parts, rng) for _ in range(125)]
    descriptions = [describe(parts, rng) for _ in range(128)]
    reworded = [describe(parts, rng, reworded=True) for _ in range(32)]
    return Task("-".join(parts), descriptions, examples[:100], examples[100:], reworded)

def tiny_tasks() -> dict[str, list[Task]]:
    """All tasks of the tiny world by split."""
    return {split: [tiny_task(parts) for parts in tasks] for split, tasks in tiny_splits().items()}

# -------------------- Documents: what to know in place of what to do --------------------

def fact_document(rng: random.Random, n_lines: int) -> Task:
    """Tiny world: lines of four words. One to eight of them are facts about words, in the form in which the
    base model answers ("cat -> gato <eos>"): which of seven other forms to name when asked "cat"."""
    words = list(FORMS)
    n_facts = rng.randint(1, min(8, n_lines))
    facts = [(word, FORMS[word][rng.choice(MAPS[1:])]) for word in rng.sample(words, n_facts)]
    lines = [f"{key} -> {value} <eos>" for key, value in facts]
    lines += [" ".join(rng.sample(words, 4)) for _ in range(n_lines - n_facts)]
    rng.shuffle(lines)
    examples = [(key, [value]) for key, value in facts]
    return Task(f"{n_lines} lines", ["\n".join(lines)], examples, examples)

def needle_document(rng: random.Random, n_lines: int) -> Task:
    """A needle in a haystack: one line of many says a magic number, the others say nothing."""
    number = str(rng.randint(10_000, 99_999))
    hay = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    lines = [hay] * (n_lines - 1)
    lines.insert(rng.randrange(n_lines), f"The magic number is {number}. Remember it.")
    examples = [("What is the magic number?", [number])]
    return Task(f"{n_lines} lines", ["\n".join(lines)], examples, examples)

DOCUMENTS = {"facts": fact_document, "needle": needle_document}
MOST_LINES = 32  # of a document to train on

def documents(kind: str, shortest: int, longest: int, n: int, split: str = "exam") -> list[Task]:
    """n documents of `shortest`, twice as many, four times as many ... lines, up to `longest`."""
    rng, doublings = random.Random(f"{kind} {split} {shortest} {longest}"), int(math.log2(longest / shortest))
    return [DOCUMENTS[kind](rng, shortest * 2 ** rng.randint(0, doublings)) for _ in range(n)]

def document_splits(kind: str) -> dict[str, list[Task]]:
    """20,000 documents to train on, and two times 100."""
    sizes = {"train": 20_000, "val": 100, "test": 100}
    return {split: documents(kind, 1, MOST_LINES, n, split) for split, n in sizes.items()}

SOURCES = {"tiny": tiny_tasks, "lots-of-loras": lots_of_loras}
SOURCES |= {kind: lambda kind=kind: document_splits(kind) for kind in DOCUMENTS}
