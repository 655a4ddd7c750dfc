"""The tiny world: 512 tasks on lists of four everyday words.

A task keeps the words of one category (or all of them), changes each, and lays the answer out: it is a tuple
(filter, map, layout), such as ("animals", "french", "reversed"). Words and phrases are in tiny.json. The
training descriptions use "seen" phrases. The reworded descriptions, for testing only, use "withheld"
phrases.
"""

import random
from itertools import product
from pathlib import Path

from data import Example, Splits, Task
from support import read_json

WORLD = read_json(Path(__file__).parent / "tiny.json")
CATEGORIES = {}  # {"animals": ["cat", ...], ...}
MAPS = ("same", "plural", "french", "spanish", "german", "italian", "capitals", "initial")
FORMS = {}  # {"cat": {"same": "cat", "plural": "cats", "french": "chat", ...}, ...}
for category, entries in WORLD["words"].items():
    CATEGORIES[category] = [entry[0] for entry in entries]
    for entry in entries:
        word = entry[0]
        FORMS[word] = dict(zip(MAPS, (*entry, word.upper(), word[0])))
FILTERS = ("all", *CATEGORIES)
LAYOUTS = {
    "in_order": lambda words: words,
    "reversed": lambda words: words[::-1],
    "first": lambda words: words[:1],
    "last": lambda words: words[-1:],
    "exclaimed": lambda words: [*words, "!"],
    "joined": lambda words: " and ".join(words).split(),
    "numbered": lambda words: " ".join(f"{i}. {word}" for i, word in enumerate(words, 1)).split(),
    "counted": lambda words: [*words, f"({len(words)})"],
}
VOCABULARY = ["<pad>", "<eos>", "<unk>", "->", "!", "and", "1.", "2.", "3.", "4.", "(1)", "(2)", "(3)", "(4)"]
for forms in FORMS.values():
    VOCABULARY += [form for form in forms.values() if form not in VOCABULARY]
Parts = tuple[str, str, str]  # filter, map, layout


def right_answer(parts: Parts, words: list[str]) -> str:
    """What the task makes of a list of words; "" if it keeps none of them."""
    category, change, layout = parts
    kept = [word for word in words if category == "all" or word in CATEGORIES[category]]
    if not kept:
        return ""
    changed = [FORMS[word][change] for word in kept]
    return " ".join(LAYOUTS[layout](changed))


def example(parts: Parts, rng: random.Random, n_words: int = 4) -> Example:
    """A list of words and the right answer.

    The words are of two categories, so a list does not show which category the task keeps.
    """
    categories = rng.sample(list(CATEGORIES), 2)
    if parts[0] not in ("all", *categories):
        categories[0] = parts[0]
    candidates = [word for category in categories for word in CATEGORIES[category]]
    while True:
        words = rng.sample(candidates, n_words)
        if answer := right_answer(parts, words):
            return Example(" ".join(words), [answer])


# -------------------- Descriptions --------------------


def describe(parts: Parts, rng: random.Random, reworded: bool = False) -> str:
    """One sentence that says what a task is; `reworded` uses withheld phrases and frames only."""
    is_nested = not reworded and rng.random() < 1 / 3
    text = nested(parts, rng) if is_nested else listed(parts, rng, reworded)
    return text[0].upper() + text[1:]


def phrase(part: str, style: str, rng: random.Random, reworded: bool = False, x: str = "") -> str:
    """One way to say a part of a task. `style`: instruction, phrase, noun or verb; the last two contain x."""
    if part in WORLD["say"]:
        entry = part
    else:
        entry = "category" if part in CATEGORIES else "language"
    names = WORLD["names"].get(part, [""])
    pattern = rng.choice(WORLD["say"][entry][style]["withheld" if reworded else "seen"])
    return pattern.format(c=rng.choice(names), l=names[0], x=x)


def left_out(parts, rng: random.Random) -> set[str]:
    """The parts that a sentence leaves out. Only default parts can be left out."""
    return {part for part in parts if part in ("all", "same", "in_order") and rng.random() < 0.4}


def listed(parts: Parts, rng: random.Random, reworded: bool) -> str:
    """One part after another: "First keep the fruits, then number them, then translate them into French." """
    style = "phrase" if rng.random() < 0.5 else "instruction"
    frame = rng.choice(WORLD["frames"][style]["withheld" if reworded else "seen"])
    part_of = dict(zip("fml", parts))  # a frame's "order" names filter, map and layout by letter
    phrase_of = {letter: phrase(part, style, rng, reworded) for letter, part in part_of.items()}
    dropped = left_out(parts[1:] if style == "phrase" else parts, rng)
    shown = [phrase_of[letter] for letter in frame["order"] if part_of[letter] not in dropped]
    if not shown:
        shown = [phrase_of["m"]]
    last = frame["last"] if len(shown) > 1 else ""
    return frame["start"] + frame["between"].join(shown[:-1]) + last + shown[-1] + frame["end"]


def nested(parts: Parts, rng: random.Random) -> str:
    """One part inside another: "Number the French words for the fruits." """
    category, change, layout = parts
    dropped = left_out(parts[1:], rng)
    around = [part for part in rng.sample([change, layout], 2) if part not in dropped]
    x = phrase(category, "phrase", rng)
    if around == [layout, change] and layout in ("first", "last") and rng.random() < 0.5:
        end = rng.choice(("last", "final") if layout == "last" else ("first", "earliest"))
        x = rng.choice(WORLD["ends"]).format(end=end, one=rng.choice(WORLD["one"][category]))
        around = [change]
    if len(around) == 2 and rng.random() < 1 / 3:
        inner, outer = around
        if rng.random() < 0.5:
            more = rng.choice((", ", " - ")) + phrase(outer, "phrase", rng)
        else:
            more = rng.choice((" and ", ", then ", ". Then ")) + phrase(outer, "instruction", rng)
        return rng.choice(WORLD["verb_openings"]) + phrase(inner, "verb", rng, x=x) + more + "."
    if len(around) == 2:
        x = phrase(around[0], "noun", rng, x=x)
    outer = around[-1] if around else "same"
    if rng.random() < 0.5:
        return rng.choice(WORLD["noun_openings"]) + phrase(outer, "noun", rng, x=x) + "."
    return rng.choice(WORLD["verb_openings"]) + phrase(outer, "verb", rng, x=x) + "."


# -------------------- The tasks --------------------


def splits() -> dict[str, list[Parts]]:
    """The 512 tasks: 479 to train on, 8 to validate, 25 to test."""
    parts = list(product(FILTERS, MAPS, LAYOUTS))
    random.Random(2506_06105).shuffle(parts)
    return {"train": parts[33:], "val": parts[25:33], "test": parts[:25]}


def task(parts: Parts) -> Task:
    """The task as data, the same every time: 128 descriptions, as published, and 100 + 25 examples."""
    rng = random.Random("-".join(parts))
    examples = [example(parts, rng) for _ in range(125)]
    descriptions = [describe(parts, rng) for _ in range(128)]
    reworded = [describe(parts, rng, reworded=True) for _ in range(32)]
    return Task("-".join(parts), descriptions, examples[:100], examples[100:], reworded)


def load() -> Splits:
    """All tasks by split."""
    tasks = {}
    for split, parts_of_tasks in splits().items():
        tasks[split] = [task(parts) for parts in parts_of_tasks]
    return tasks


if __name__ == "__main__":  # list the words that the tiny base model knows in an input
    for category, words in CATEGORIES.items():
        print(f"{category}: {', '.join(words)}")
