"""Write notes with questions as folders of documents, to train Doc-to-LoRA for a real model on.

    python checkpoints/smollm2-135m/notes.py out/notes

A note is a few lines as people jot them down: about persons, meetings, trips, products, recipes, contacts or
an inventory. It holds 1 to 12 facts about one to four things, in any order, among lines that say nothing. The
questions ask for values; of some the answer is not in the note. The folder holds training, validation and
test notes, and in folders of their own more test notes:

    reworded/       sentences and questions that never occur in training
    other_kind/     notes of a kind that never occurs in training
    long/           four notes of 10 facts in one
    facts_N/        notes of N facts

Sentences are in assets/notes.json. A fifth of each list of ten or more values is for test notes only. All are
made up. What helps to copy any word: in training half of the words are drawn from SmolLM2's vocabulary, and
notes of one line are to be repeated.
"""

import json
import random
import re
import sys
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
import model

ASSETS = Path(__file__).parents[2] / "assets"
DATA = json.loads((ASSETS / "notes.json").read_text(encoding="utf-8"))
POOLS = json.loads((ASSETS / "chores.json").read_text(encoding="utf-8"))["pools"] | DATA["pools"]
SPLITS = {"train": 30_000, "val": 60, "test": 100}
FACTS = [1, 1, 1, 2, 2, 3, 3, 4, 4, *range(5, 13)]  # so many in a note
N_QUESTIONS, UNANSWERABLE = 4, 1  # of a note; the latter are among the former
MONTHS = "January February March April May June July August September October November December".split()

@cache
def pool(name: str, test: bool) -> list[str]:
    """The values of a pool for training, or those for testing."""
    values = POOLS[name].split(":" if ":" in POOLS[name] else None)
    random.Random(name).shuffle(values)
    n_train = len(values) * 4 // 5
    return values if len(values) < 10 else values[n_train:] if test else values[:n_train]

@cache
def vocabulary() -> list[str]:
    """The words of SmolLM2's tokenizer, but for those of test notes."""
    tokenizer = model.load(AutoTokenizer, model.PRESETS["smollm2-135m"][0])
    withheld = {word for name in POOLS for value in pool(name, True) for word in value.split()}
    words = [token[1:] for token in tokenizer.get_vocab() if re.fullmatch("Ġ[A-Za-z][a-z]{2,}", token)]
    return sorted(set(words) - withheld)

def make_value(kind: str, rng: random.Random, test: bool) -> str:
    """A value: a number with what belongs to it, or one of a pool."""
    numbers = {
        "age": lambda: f"{rng.randint(18, 89)}",
        "few": lambda: f"{rng.randint(2, 9)}",
        "count": lambda: f"{rng.randint(11, 98)}",
        "clock": lambda: f"{rng.randint(7, 20)}:{rng.choice(['00', '15', '30', '45'])}",
        "price": lambda: f"{rng.randint(11, 999)} euros",
        "weight": lambda: f"{rng.randint(2, 90)} kg",
        "grams": lambda: f"{rng.randint(10, 90)}0 grams",
        "degrees": lambda: f"{rng.randint(14, 25)}0 degrees",
        "minutes": lambda: f"{rng.randint(11, 90)} minutes",
        "shelf": lambda: f"shelf {rng.randint(2, 60)}",
        "phone": lambda: f"0{rng.randint(200, 999)} {rng.randint(10_000, 99_999)}",
        "date": lambda: f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        "street": lambda: f"{rng.choice(pool('street', test))} Street {rng.randint(1, 99)}",
        "full_name": lambda: f"{rng.choice(pool('first', test))} {rng.choice(pool('last', test))}",
    }
    if kind in numbers:
        return numbers[kind]()
    return rng.choice(pool(kind, test) if test or rng.random() < 0.5 else vocabulary())

def make_note(kind: dict, n_facts: int, rng: random.Random, test: bool, withheld: bool) -> dict:
    """A document: a note of one kind, and questions."""
    facts, part = kind["facts"], "withheld" if withheld else "seen"
    n_things = max(-(-n_facts // len(facts)), min(n_facts, rng.randint(1, 3)))
    things = []
    while len(things) < n_things + 1:  # the last one is not in the note
        things += [thing for thing in [make_value(kind["entity"], rng, test)] if thing not in things]
    every = [(thing, name) for thing in things[:n_things] for name in facts]
    told = rng.sample(every, n_facts)
    values = {pair: make_value(facts[pair[1]]["value"], rng, test) for pair in told}
    lines = [rng.choice(facts[name][part]).format(e=thing, v=values[thing, name]) for thing, name in told]
    lines += rng.sample(DATA["distractors"], rng.randint(0, 3) if n_facts > 1 else 0)
    rng.shuffle(lines)

    untold = [pair for pair in every if pair not in told] or [(things[-1], name) for name in facts]
    asked = rng.sample(told, min(n_facts, N_QUESTIONS - UNANSWERABLE)) + rng.sample(untold, UNANSWERABLE)
    questions = []
    for thing, name in asked:
        question = rng.choice(facts[name]["ask_withheld" if withheld else "ask"]).format(e=thing)
        answer = values.get((thing, name), DATA["missing"])
        questions.append({"question": question[0].upper() + question[1:], "answer": answer})
    document = "\n".join(line[0].upper() + line[1:] for line in lines)
    if n_facts == 1 and not test:
        questions.append({"question": "Repeat the note.", "answer": document})
    return {"document": document, "questions": questions}

def write(folder: Path, sizes: dict, kinds="kinds", facts=FACTS, withheld=False, joined=1) -> None:
    """A folder of notes, `sizes` of each split; each file holds so many notes `joined`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {split: [f"{split}{i}" for i in range(n)] for split, n in sizes.items()}
    for split, name in ((split, name) for split in names for name in names[split]):
        rng = random.Random(f"{kinds} {facts} {withheld} {joined} {name}")
        chosen = rng.sample(list(DATA[kinds].values()), joined)
        notes = [make_note(kind, rng.choice(facts), rng, split != "train", withheld) for kind in chosen]
        content = {"name": name, "document": "\n".join(note["document"] for note in notes)}
        content["questions"] = [question for note in notes for question in note["questions"]]
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "splits.json").write_text(json.dumps(names))

def main(folder: Path) -> None:
    write(folder, SPLITS)
    write(folder / "reworded", {"test": 100}, withheld=True)
    write(folder / "other_kind", {"test": 100}, kinds="withheld_kinds")
    write(folder / "long", {"test": 50}, facts=[10], joined=4)
    for n in (1, 3, 6, 9, 12):
        write(folder / f"facts_{n}", {"test": 50}, facts=[n])

if __name__ == "__main__":
    main(Path(sys.argv[1]))
