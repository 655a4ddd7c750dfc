"""Tasks: what the hypernetwork is trained on and judged by.

A task is a name, descriptions of it in words, and examples (input, right answers). They come from a folder of
JSON files (Natural Instructions' format) or from the built-in tiny world, which is made up below: 512 tasks on
lists of four everyday words, such as "keep the animals, translate them into French, reverse the order".
"""

import json
import math
import os
import random
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from itertools import product
from pathlib import Path
from urllib.request import urlopen

from tqdm import tqdm

from lora import UserError, read_json, write_json

Example = tuple[str, list[str]]  # input, right answers; the first of them is the one to learn


@dataclass
class Task:
    """One task. `reworded` are descriptions in wordings that no training description uses (tiny world only);
    `definition` is what --prompt_with_definition puts before the input, or where there is none the description in use."""

    name: str
    descriptions: list[str]
    train: list[Example]
    test: list[Example]
    reworded: list[str] = field(default_factory=list)
    definition: str = ""


def load_tasks(source: str) -> dict[str, list[Task]]:
    """{"train": [...], "val": [...], "test": [...]} of a built-in source, or of a folder of task files."""
    return SOURCES[source]() if source in SOURCES else folder_tasks(source)


def pick(tasks: dict[str, list[Task]], split: str, n_tasks: int | None = None) -> list[Task]:
    """The first n tasks of a split in one fixed shuffled order, so that fewer tasks are a subset of more."""
    if not tasks.get(split):
        raise UserError(f"these tasks have no split {split}; they have {', '.join(k for k, v in tasks.items() if v)} (see --split)")
    chosen = list(tasks[split])
    random.Random(0).shuffle(chosen)
    if n_tasks is not None and not 1 <= n_tasks <= len(chosen):
        raise UserError(f"--n_tasks {n_tasks}: the {split} split has 1 to {len(chosen)} tasks")
    return chosen[:n_tasks]


# ---------------------------------------------------------------------------------------------------------
# A folder of task files
# ---------------------------------------------------------------------------------------------------------


def folder_tasks(folder: str | Path) -> dict[str, list[Task]]:
    """Read NAME.json files, split as splits.json says; without it all are training tasks."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--tasks {folder}: neither {', nor '.join(SOURCES)}, nor a folder of task files")
    files = sorted(p for p in folder.glob("*.json") if p.name != "splits.json")
    if not files:
        raise UserError(f"--tasks {folder}: no task files (NAME.json) in it")
    splits = read_json(folder / "splits.json") if (folder / "splits.json").exists() else {"train": [p.stem for p in files]}
    if not all(isinstance(names, list) for names in splits.values()):
        raise UserError(f'{folder}/splits.json takes {{"train": [names], "val": [...], "test": [...]}}')
    tasks = {split: [read_task(folder / f"{name}.json") for name in splits.get(split, [])] for split in ("train", "val", "test")}
    names = [task.name for split in tasks.values() for task in split]  # an oracle's folder is named after its task
    if wrong := {name for name in names if names.count(name) > 1 or Path(name).name != name or name in ("", "..")}:
        raise UserError(f"{folder}: these names of tasks occur twice or are no names of folders: {', '.join(sorted(wrong))}")
    return tasks


def are_texts(value) -> bool:
    """Whether this is a list of texts, none of them empty."""
    return isinstance(value, list) and value != [] and all(isinstance(text, str) and text.strip() for text in value)


def read_task(path: Path) -> Task:
    """One file: {"name", "descriptions" or "Definition", "Instances": [{"input", "output": [...]}]}, of whose instances the
    last fifth is the test part; or {"document", "questions": [{"question", "answer"}]}."""
    content = read_json(path)
    as_list = lambda text: [text] if isinstance(text, str) else text
    try:
        if "document" in content:  # what to know in place of what to do; there are questions about it
            descriptions, definition = [content["document"]], ""
            examples = [(x["question"].strip(), [a.strip() for a in as_list(x["answer"])]) for x in content["questions"]]
        else:
            descriptions = as_list(content.get("descriptions") or content["Definition"])
            definition = as_list(content.get("Definition") or [""])[0]
            examples = [(x["input"].strip(), [o.strip() for o in as_list(x["output"])]) for x in content["Instances"]]
        complete = are_texts(descriptions) and examples and all(outputs for _, outputs in examples) and are_texts([content.get("name", "any")])
    except (AttributeError, KeyError, IndexError, TypeError) as e:
        raise UserError(f"{path} is not a task file: {e} is missing or of the wrong kind") from None
    if not complete:
        raise UserError(f"{path} is not a task file: it takes instances with an output each, and descriptions (or a document) that are not empty; its name, if it has one, is a text")
    n_train = len(examples) - len(examples) // 5
    train, test = (examples, examples) if "document" in content else (examples[:n_train], examples[n_train:])
    return Task(content.get("name", path.stem), descriptions, train, test, definition=definition)


NATURAL_INSTRUCTIONS = "https://raw.githubusercontent.com/allenai/natural-instructions/master/tasks"


def lots_of_loras() -> dict[str, list[Task]]:
    """The paper's 479 training tasks and 11 validation tasks, all of them from Natural Instructions.

    Downloads the files that are not in the cache yet, so a later call goes on where one was cut off. A file that is cut
    off (of another length than announced, or no JSON) is not kept.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text-to-lora" / "lots-of-loras"
    splits = read_json(Path(__file__).parent / "assets" / "lots_of_loras.json")
    names = [name for split in splits.values() for name in split]
    missing = [name for name in names if not (folder / f"{name}.json").exists()]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "splits.json", splits)
    for i, name in enumerate(tqdm(missing, desc="Natural Instructions", unit="file", disable=not missing)):
        try:
            with urlopen(f"{NATURAL_INSTRUCTIONS}/{name}.json", timeout=60) as response:
                task = json.loads(response.read())
        except (OSError, HTTPException, ValueError) as e:
            raise UserError(
                f"--tasks lots-of-loras: {len(missing) - i} of {len(names)} task files are not in {folder}, "
                f"and {NATURAL_INSTRUCTIONS}/{name}.json cannot be read: {e or type(e).__name__}"
            ) from None
        write_json(folder / f"{name}.json", task)
    return folder_tasks(folder)


# ---------------------------------------------------------------------------------------------------------
# The tiny world: its words
# ---------------------------------------------------------------------------------------------------------


def read_tables(path: Path) -> dict[str, dict[str, str]]:
    """{table: {name: text}} of assets/tiny_world.txt. An indented line goes on with the text above it."""
    tables, table, name = {}, {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            table = tables[line.strip("[]")] = {}
        elif line.strip() and not line.startswith("#"):
            name, text = (name, line) if line[0].isspace() else line.split(maxsplit=1)
            table[name] = f"{table.get(name, '')} {text.strip()}".strip()
    return tables


TABLES = read_tables(Path(__file__).parent / "assets" / "tiny_world.txt")
CATEGORIES: dict[str, list[str]] = {}
FORMS: dict[str, dict[str, str]] = {}  # {"cat": {"plural": "cats", "french": "chat", ...}}
MAPS = ("same", "plural", "french", "spanish", "german", "italian", "capitals", "initial")
for category, text in TABLES["words"].items():
    entries = [entry.split() for entry in text.split(";")]
    CATEGORIES[category] = [entry[0] for entry in entries]
    FORMS |= {e[0]: dict(zip(MAPS, (*e, e[0].upper(), e[0][0]))) for e in entries}
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
VOCABULARY = [
    "<pad>", "<eos>", "<unk>", "->", "!", "and", "1.", "2.", "3.", "4.", "(1)", "(2)", "(3)", "(4)",
    *dict.fromkeys(form for forms in FORMS.values() for form in forms.values()),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------
# The tiny world: its sentences
# ---------------------------------------------------------------------------------------------------------

NAMES = {  # what a category or a language is called
    "animals": "animals | creatures | animal words | beasts | animal names | kinds of animal | living creatures",
    "fruits": "fruits | fruit | kinds of fruit | fruit names | fruit words | pieces of fruit | things that grow as fruit",
    "colours": "colours | colors | colour words | color words | names of colours | shades | hues",
    "clothes": "clothes | garments | items of clothing | clothing | things to wear | pieces of clothing | clothing words",
    "body": "body parts | parts of the body | parts of a body | anatomy words | bodily parts | words for the human body",
    "house": "household things | household objects | things in the house | household items | things found at home | objects from the home | furnishings and tools",
    "nature": "nature words | things from nature | natural things | things found outdoors | things in the landscape | outdoor words | elements of nature",
    "french": "French", "spanish": "Spanish", "german": "German", "italian": "Italian",
}  # fmt: skip
ONE = {  # and what one of them is called
    "all": "word | item | entry", "animals": "animal | creature | animal word | beast", "fruits": "fruit | kind of fruit | fruit word",
    "colours": "colour | color | colour word | shade", "clothes": "garment | item of clothing | piece of clothing | clothing word",
    "body": "body part | part of the body", "house": "household thing | household object | household item | thing for the house",
    "nature": "nature word | thing from nature | natural thing | outdoor thing",
}  # fmt: skip
# Sentence frames: start, order of filter, map and layout, what goes between them, before the last, and after it.
INSTRUCT = [  # of instructions
    ("", "fml", ", ", " and ", "."), ("", "fml", ". Then ", ". Finally ", "."), ("First ", "fml", ", then ", ", then ", "."),
    ("", "fml", "; ", "; ", "."), ("Please ", "fml", ", ", ", and ", "."), ("Your task: ", "fml", "; ", "; ", "."),
    ("You get a list of words: ", "fml", ", ", " and ", "."), ("I want you to ", "fml", ", to ", " and to ", "."),
    ("In this task you ", "fml", ", ", ", and ", "."), ("From the words given, ", "fml", ", ", " and ", "."),
    ("", "mfl", " after you ", ", and ", "."), ("", "lfm", ", but first ", " and ", "."), ("Given some words, ", "fml", ". ", ". ", "."),
    ("", "fml", ", and ", ". Also ", "."), ("When you read the list, ", "fml", ", ", ", and ", "."), ("You should ", "fml", ", ", " and ", "."),
    ("", "flm", " and ", ", and ", "."), ("Step one: ", "fml", ". Next: ", ". Next: ", "."), ("", "fml", " - ", " - ", ""),
    ("", "mlf", ", ", ", but only after you ", "."),
    # withheld
    ("What you have to do is ", "fml", ", ", " and ", "."), ("Could you ", "fml", ", ", " and ", "?"), ("The job is to ", "fml", ", ", ", and ", "!"),
]  # fmt: skip
PHRASE = [  # of phrases
    ("", "fml", " ", ", ", "."), ("Write ", "fml", " ", ", ", "."), ("Give me ", "fml", " ", ", ", "."), ("List ", "flm", ", ", ", ", "."),
    ("Output ", "fml", ", ", ", ", "."), ("The answer is ", "fml", " ", ", ", "."), ("Return ", "flm", ", ", " and ", "."),
    ("What are ", "fml", " ", ", ", "?"), ("Show ", "fml", " ", " and ", "."), ("I need ", "fml", ", ", ", ", "."), ("Answer with ", "fml", " ", ", ", "."),
    ("Your answer contains ", "fml", ", ", ", ", "."), ("Copy out ", "fml", " ", ", ", "."), ("Say ", "fml", " ", ", ", "!"),
    ("", "fml", ", ", ", ", ""), ("From the list give ", "fml", " ", ", ", "."), ("Print ", "flm", " ", ", ", "."), ("Please write down ", "fml", " ", ", ", "."),
    # withheld
    ("Tell me ", "fml", " ", ", ", "."), ("We would like ", "fml", ", ", ", ", "."), ("The output should be ", "fml", " ", ", ", "."),
]  # fmt: skip
WITHHELD_FRAMES = 3
NOUNS = ("", "Write ", "Give me ", "List ", "Return ", "What are ", "Show me ", "I need ", "I would like ", "Print ", "Output ", "Answer with ")
VERBS = ("", "Please ", "I want you to ", "Your task is to ", "You should ", "In this task you ", "Given four words, ", "With these words, ")
ENDS = ("the {end} {one}", "the {end} {one} in the list", "only the {end} {one}", "just the {end} {one} you see", "the {end} of the words that is a {one}", "the very {end} {one}")
DEFAULTS = {"all", "same", "in_order"}  # parts that a sentence may leave unsaid


def split_phrases(text: str) -> list[tuple[list[str], ...]]:
    """[(seen, withheld) instructions, (seen, withheld) phrases], for maps and layouts then what is built around other words {x}:
    [(noun phrases,), (verb phrases,)]"""
    return [tuple([phrase.strip() for phrase in part.split("|")] for part in style.split("||")) for style in text.split(" -- ")]


SAY = {part: split_phrases(text) for table in ("filter", "map", "layout") for part, text in TABLES[table].items()}


def say(part: str, style: int, rng: random.Random, reworded: bool = False, x: str = "") -> str:
    """One way to say a part of a task: 0 an instruction, 1 a phrase, 2 a noun phrase or 3 a verb phrase around x."""
    general = part if part in SAY else "category" if part in CATEGORIES else "language"
    names = NAMES.get(part, "").split(" | ")
    return rng.choice(SAY[general][style][reworded]).format(c=rng.choice(names), l=names[0], x=x)


def unsaid(parts: tuple[str, ...], rng: random.Random) -> set[str]:
    """Which of the parts a sentence leaves out, being what one would expect anyway."""
    return {part for part in parts if part in DEFAULTS and rng.random() < 0.4}


def describe(parts: tuple[str, str, str], rng: random.Random, reworded: bool = False) -> str:
    """One sentence that says what a tiny task is; `reworded` makes it of withheld phrases and frames only."""
    text = nested(parts, rng) if not reworded and rng.random() < 1 / 3 else listed(parts, rng, reworded)
    return text[0].upper() + text[1:]


def listed(parts: tuple[str, str, str], rng: random.Random, reworded: bool) -> str:
    """One part after another: "First keep the fruits, then number them, then translate them into French." """
    style = rng.random() < 0.5  # False: instructions, True: phrases
    frames = PHRASE if style else INSTRUCT
    start, order, between, last, end = rng.choice(frames[-WITHHELD_FRAMES:] if reworded else frames[:-WITHHELD_FRAMES])
    said = {kind: say(part, style, rng, reworded) for kind, part in zip("fml", parts)}
    drop = unsaid(parts[1:] if style else parts, rng)
    words = [said[kind] for kind in order if parts["fml".index(kind)] not in drop] or [said["m"]]
    return start + between.join(words[:-1]) + (last if words[:-1] else "") + words[-1] + end


def nested(parts: tuple[str, str, str], rng: random.Random) -> str:
    """One part inside another: "Number the French words for the fruits." """
    chosen, change, layout = parts
    drop = unsaid(parts[1:], rng)
    around = [part for part in rng.sample([change, layout], 2) if part not in drop]
    x = say(chosen, 1, rng)
    if around == [layout, change] and layout in ("first", "last") and rng.random() < 0.5:
        end = rng.choice(("last", "final") if layout == "last" else ("first", "earliest"))
        x = rng.choice(ENDS).format(end=end, one=rng.choice(ONE[chosen].split(" | ")))
        around = [change]
    if len(around) == 2 and rng.random() < 1 / 3:
        more = rng.choice((", ", " - ")) + say(around[1], 1, rng) if rng.random() < 0.5 else rng.choice((" and ", ", then ", ". Then ")) + say(around[1], 0, rng)
        return rng.choice(VERBS) + say(around[0], 3, rng, x=x) + more + "."
    *inner, outer = around or ["same"]
    for part in inner:
        x = say(part, 2, rng, x=x)
    if rng.random() < 0.5:
        return rng.choice(NOUNS) + say(outer, 2, rng, x=x) + "."
    return rng.choice(VERBS) + say(outer, 3, rng, x=x) + "."


# ---------------------------------------------------------------------------------------------------------
# The tiny world: its tasks
# ---------------------------------------------------------------------------------------------------------


def tiny_example(parts: tuple[str, str, str], rng: random.Random, n_words: int = 4) -> Example:
    """A list of words and the right answer.

    The words are of two categories, mixed at random whatever the task. So a list does not give its task away: of the filter it
    says no more than that a category would be one of these two.
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


def tiny_inputs(description: str, n: int = 3) -> list[str]:
    """Inputs to show an adapter on, with words of the category that the description names, if it names one."""
    named = [c for c in CATEGORIES if any(name in description.lower() for name in (c, *NAMES[c].split(" | ")))]
    rng = random.Random(0)
    return [tiny_example((named[0] if named else "all", "same", "in_order"), rng)[0] for _ in range(n)]


def tiny_splits() -> dict[str, list[tuple[str, str, str]]]:
    """The 512 tasks as (filter, map, layout): 479 to train on, 8 to validate, 25 to test."""
    parts = list(product(FILTERS, MAPS, LAYOUTS))
    random.Random(2506_06105).shuffle(parts)
    return {"test": parts[:25], "val": parts[25:33], "train": parts[33:]}


def tiny_task(parts: tuple[str, str, str], n_train: int = 100, n_test: int = 25, n_descriptions: int = 128) -> Task:
    """The task as data: 128 descriptions, as many as the paper's, and examples that are the same every time."""
    rng = random.Random("-".join(parts))
    examples = [tiny_example(parts, rng) for _ in range(n_train + n_test)]
    descriptions = [describe(parts, rng) for _ in range(n_descriptions)]
    return Task(
        name="-".join(parts),
        descriptions=descriptions,
        train=examples[:n_train],
        test=examples[n_train:],
        reworded=[describe(parts, rng, reworded=True) for _ in range(n_descriptions // 4)],
    )


def tiny_tasks() -> dict[str, list[Task]]:
    """All tasks of the tiny world by split."""
    return {split: [tiny_task(parts) for parts in tasks] for split, tasks in tiny_splits().items()}


# ---------------------------------------------------------------------------------------------------------
# Documents: what to know in place of what to do. A task is one document, its examples are questions about it
# ---------------------------------------------------------------------------------------------------------


def fact_document(rng: random.Random, n_lines: int) -> Task:
    """Tiny world: lines of four words, of which one to eight are facts about words ("cat -> gato <eos>", as the base model would
    end an answer): in which of its seven other forms each is to be named. The questions are like "cat"."""
    words = list(FORMS)
    n_facts = rng.randint(1, min(8, n_lines))
    facts = [(word, FORMS[word][rng.choice(MAPS[1:])]) for word in rng.sample(words, n_facts)]
    lines = [f"{key} -> {value} <eos>" for key, value in facts]
    lines += [" ".join(rng.sample(words, 4)) for _ in range(n_lines - n_facts)]
    rng.shuffle(lines)
    examples = [(key, [value]) for key, value in facts]
    return Task(f"{n_lines} lines", ["\n".join(lines)], examples, examples)


NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def needle_document(rng: random.Random, n_lines: int) -> Task:
    """A needle in a haystack: one line of many says a magic number, the others say nothing."""
    number = str(rng.randint(10_000, 99_999))
    lines = [NOISE] * (n_lines - 1)
    lines.insert(rng.randrange(n_lines), f"The magic number is {number}. Remember it.")
    examples = [("What is the magic number?", [number])]
    return Task(f"{n_lines} lines", ["\n".join(lines)], examples, examples)


DOCUMENTS = {"facts": fact_document, "needle": needle_document}
LONGEST = 32  # lines of a document to train on


def documents(kind: str, shortest: int, longest: int, n: int, split: str = "exam") -> list[Task]:
    """n documents of `shortest`, twice as many, four times as many ... lines, up to `longest`. Each split has its own."""
    rng = random.Random(f"{kind} {split} {shortest} {longest}")
    return [DOCUMENTS[kind](rng, shortest * 2 ** rng.randint(0, int(math.log2(longest / shortest)))) for _ in range(n)]


def document_splits(kind: str) -> dict[str, list[Task]]:
    """20,000 documents to train on, and two times 100."""
    return {split: documents(kind, 1, LONGEST, n, split) for split, n in (("train", 20_000), ("val", 100), ("test", 100))}


SOURCES = {"tiny": tiny_tasks, "lots-of-loras": lots_of_loras} | {kind: partial(document_splits, kind) for kind in DOCUMENTS}
