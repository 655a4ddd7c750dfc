"""Families of chores with a parameter: about 1,000 chores in addition to those of chores.py.

"Replace every comma by a tilde." is of the family `replace`. The parameter is the value of the last slot,
here the tilde. A fifth of a family's parameters is in none of its training tasks. The splits are those of
chores.py, with these chores added to "train", and

    families   the training chores of the families, for measuring
    withheld   chores of the families with withheld parameters

families.json holds the values of slots, their names, and descriptions with slots. The descriptions were
written like those of chores.py: in different voices, from inputs and outputs alone. Three per family are for
testing only. The names in their slots are mostly the same as in training.
"""

import inspect
import random
import re
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

from data import Example, Splits, Task
from support import read_json
from tasks import chores
from tasks.chores import FORMS, MAKE, Draw, LazyList, differ, share

DATA = read_json(Path(__file__).parent / "families.json")
N_TRAIN, N_WITHHELD = 40, 8  # at most so many chores of a family

PARTS = FORMS | {
    "record": "".join(rf"(?=.*{key}: (?P<{key}>[\w ]+))" for key in ("name", "city", "age", "job")) + ".*",
    "words": r"(?P<first>\w+), (?P<second>\w+)(, \w+)*, (?P<last>\w+)",
}
SEPARATORS = {"name": " ", "date": "-", "time": ":", "phone": " ", "code": "-"}
SEPARATORS |= {"record": "; ", "path": "/", "words": ", "}
SIGNS = " -:@./,"


class Text(str):
    """A text of a sort, whose parts and items can be named. A part is named "sort-part"."""

    def __new__(cls, sort: str, text: str):
        self = super().__new__(cls, text)
        self.sort = sort
        return self

    def span(self, part: str) -> tuple[int, int]:
        return re.fullmatch(PARTS[self.sort], self).span(part.split("-")[1])

    def part(self, part: str) -> str:
        return self[slice(*self.span(part))]

    def put(self, part: str, new: str) -> str:
        """The text with something in place of a part."""
        start, end = self.span(part)
        return self[:start] + new + self[end:]

    def without(self, part: str) -> str:
        """The text without a part and the sign before it (after it, if the part is the first)."""
        if self.sort == "record":
            return chores.without_field(self, part.split("-")[1])
        start, end = self.span(part)
        before, after = self[:start].rstrip(SIGNS), self[end:]
        return before + after if before.strip("+$") else after.lstrip(SIGNS)

    def swap(self, part: str, other: str) -> str:
        (a, b), (c, d) = sorted([self.span(part), self.span(other)])
        return self[:a] + self[c:d] + self[b:c] + self[a:b] + self[d:]

    def items(self) -> list[str]:
        return self.split(SEPARATORS[self.sort])

    def with_items(self, items: list[str]) -> str:
        return SEPARATORS[self.sort].join(items)


def around(text: str, pair: str) -> str:
    """A text between the halves of a pair of signs, such as "()" or "<b></b>"."""
    middle = len(pair) // 2
    return f"{pair[:middle]}{text}{pair[middle:]}"


NUMBERS = {"1": "12345678", "a": "abcdefgh", "A": "ABCDEFGH"}


def number(items: list[str], style: str) -> str:
    """Items with numbers in a style, such as "(1)" or "a."."""
    kind = next(sign for sign in style if sign in NUMBERS)
    return " ".join(f"{style.replace(kind, n)} {item}" for n, item in zip(NUMBERS[kind], items))


ORDERS = {
    "backwards": lambda items: items[::-1],
    "sorted": sorted,
    "sorted down": lambda items: sorted(items)[::-1],
    "first to the end": lambda items: items[1:] + items[:1],
    "last to the front": lambda items: items[-1:] + items[:-1],
    "ends swapped": lambda items: items[-1:] + items[1:-1] + items[:1],
}
FAMILIES = {  # the arguments after the text are the slots; the last one is the parameter
    "replace": lambda t, gap, joiner: t.replace(gap, joiner),
    "remove": lambda t, gap: t.replace(gap, ""),
    "before": lambda t, label: f"{label} {t}",
    "behind": lambda t, note: f"{t} {note}",
    "around": around,
    "twice": lambda t, joiner: f"{t}{joiner}{t}",
    "mask": lambda t, part, cover: t.put(part, cover * len(t.part(part))),
    "mask_rest": lambda t, part, cover: t.put(part, t.part(part)[0] + cover * (len(t.part(part)) - 1)),
    "hide": lambda t, part, hidden: t.put(part, hidden),
    "around_part": lambda t, part, pair: t.put(part, around(t.part(part), pair)),
    "before_part": lambda t, part, mark: t.put(part, mark + t.part(part)),
    "behind_part": lambda t, part, mark: t.put(part, t.part(part) + mark),
    "capitals_part": lambda t, part: t.put(part, t.part(part).upper()),
    "small_part": lambda t, part: t.put(part, t.part(part).lower()),
    "drop": lambda t, part: t.without(part),
    "start": lambda t, n, part: t.part(part)[: int(n)],
    "end": lambda t, n, part: t.part(part)[-int(n) :],
    "shorten": lambda t, part: t.put(part, t.part(part)[0] + "."),
    "to_front": lambda t, part, joiner: t.part(part) + joiner + t.without(part),
    "to_back": lambda t, part, joiner: t.without(part) + joiner + t.part(part),
    "combine": lambda t, part, other, joiner: t.part(part) + joiner + t.part(other),
    "swap": lambda t, part, other: t.swap(part, other),
    "label_part": lambda t, part, label: f"{label} {t.part(part)}",
    "note_part": lambda t, part, note: f"{t.part(part)} {note}",
    "around_items": lambda t, items, pair: t.with_items([around(item, pair) for item in t.items()]),
    "before_items": lambda t, items, mark: t.with_items([mark + item for item in t.items()]),
    "number": lambda t, items, style: number(t.items(), style),
    "lines": lambda t, items, mark: "\n".join(f"{mark} {item}" for item in t.items()),
    "order": lambda t, order, items: t.with_items(ORDERS[order](t.items())),
}


# -------------------- Chores: a family, a sort of text, and a value for each slot --------------------


class Chore(NamedTuple):
    name: str
    family: str
    sort: str
    values: dict[str, str]  # {slot: value}


def slots_of(family: str) -> list[str]:
    return list(inspect.signature(FAMILIES[family]).parameters)[1:]


def values_of(slot: str, sort: str) -> list[str]:
    """What can stand in a slot of a chore for texts of a sort."""
    if slot in ("part", "other"):
        parts = re.compile(PARTS[sort]).groupindex
        return [f"{sort}-{part}" for part in parts if part not in ("where", "when")]
    if slot == "items":
        return [f"{sort}-items"] if sort in SEPARATORS else []
    return DATA["gap"][sort] if slot == "gap" else list(DATA[slot])


def chores_of(family: str) -> list[Chore]:
    """All that a family could do."""
    found, slots = [], slots_of(family)
    for sort in MAKE:
        for values in product(*(values_of(slot, sort) for slot in slots)):
            if len(set(values)) == len(values):  # no part is swapped with itself
                found.append(Chore(f"{family}-{sort}-{len(found)}", family, sort, dict(zip(slots, values))))
    return found


def parameters_of(chore: Chore) -> set[str]:
    """The value of the last slot; of a swap both parts."""
    values = list(chore.values.values())
    return set(values if chore.family == "swap" else values[-1:])


def right_answer(chore: Chore, text: str) -> str:
    """What a chore makes of a text."""
    return FAMILIES[chore.family](Text(chore.sort, text), **chore.values)


def new_ones(found: list[Chore], inputs: dict[str, list[str]], known: set[tuple]) -> Iterator[Chore]:
    """Yield the chores that change their text and have new answers. Adds these answers to `known`."""
    for chore in found:
        answers = tuple(right_answer(chore, text) for text in inputs[chore.sort])
        if differ(inputs[chore.sort], answers) and len(set(answers)) > 2 and answers not in known:
            known.add(answers)
            yield chore


def all_chores() -> tuple[list[Chore], list[Chore]]:
    """Chores to train on, and those with a parameter that is withheld. None does what chores.py does."""
    inputs = {sort: chores.inputs_of(sort) for sort in MAKE}
    known = {tuple(chores.answers(chain, inputs[chain[0]])) for chain in chores.all_chains()}
    train, withheld = [], []
    for family in FAMILIES:
        found = chores_of(family)
        random.Random(family).shuffle(found)
        parameters = sorted(set().union(*map(parameters_of, found)))
        unknown = set(share(parameters, family, test=True))
        seen = [chore for chore in found if not unknown & parameters_of(chore)]
        rest = [chore for chore in found if unknown & parameters_of(chore)]
        train += islice(new_ones(seen, inputs, known), N_TRAIN)
        withheld += islice(new_ones(rest, inputs, known), N_WITHHELD)
    return train, withheld


# -------------------- Descriptions --------------------


def name_in(rng: random.Random, split: str, slot: str, value: str) -> str:
    """What a value is called in a description, for "train" or "test"."""
    if slot in ("part", "other", "items"):
        return rng.choice(DATA["names"][split][value])
    if slot in ("label", "note", "hidden"):
        return rng.choice(['"{}"', "'{}'", "{}"]).format(value)
    is_sign = slot in ("gap", "mark", "cover", "joiner")
    names = DATA["sign" if is_sign else slot][value]
    if is_sign and slot != "gap":
        names = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    if is_sign and " " not in value:
        names = names + [f"'{value}'"]
    return rng.choice(names)


def description(chore: Chore, i: int, split: str = "train") -> str:
    """Description i of a chore: one of its family, with names in its slots."""
    rng = random.Random(f"{chore.name} {split} {i}")
    templates = DATA["descriptions"][split][chore.family]
    template = rng.choice(templates) if split == "train" else templates[i]
    names = {slot: name_in(rng, split, slot, value) for slot, value in chore.values.items()}
    names["text"] = rng.choice(DATA["names"][split][chore.sort])
    return chores.capitalise(template.format(**names))


def make_task(chore: Chore, split: str = "train") -> Task:
    """The task as data. Training examples and descriptions are drawn afresh in each step."""

    def example(i: int, test: bool = False) -> Example:
        text = MAKE[chore.sort](Draw(f"{chore.name} {i}", test=test))
        return Example(text, [right_answer(chore, text)])

    reworded = [description(chore, i, "test") for i in range(len(DATA["descriptions"]["test"][chore.family]))]
    descriptions = LazyList(lambda i: description(chore, i)) if split == "train" else reworded
    test = [example(i, test=True) for i in range(chores.N_EXAMPLES)]
    return Task(chore.name, descriptions, LazyList(example), test, reworded)


def load() -> Splits:
    """All tasks by split."""
    splits, (train, withheld) = chores.load(), all_chores()
    return splits | {
        "train": splits["train"] + [make_task(chore) for chore in train],
        "families": [make_task(chore) for chore in train],
        "withheld": [make_task(chore, "test") for chore in withheld],
    }
