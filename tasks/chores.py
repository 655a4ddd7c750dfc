"""Text chores, to train Text-to-LoRA for a real model on.

A chore does one thing to one sort of text: "Give the surname.", "Convert the date to DD.MM.YYYY." A task is
one chore, or a chain of two: "Give the domain of the e-mail address, then write it in capitals." The splits:

    train     single chores, and chains of two
    val       32 chains that no training task has; and these, and 32 single chores, in a withheld voice
    test      100 more such chains
    single    the single chores of the training tasks
    unseen    13 chores that occur in no training task
    open      162 requests by writers who had seen only the texts; some go beyond the chores

chores.json holds the values of inputs, and what the chores do. All values are made up; a fifth of the names,
places and words is for test examples only.

chores_descriptions.json holds descriptions that were written one by one, from inputs and outputs alone. The
writers had different voices: 18 for training, 8 for chains only, others for validation and testing. The test
descriptions (`reworded`, and all of `unseen`) are three per chore: terse, a full sentence, put differently.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from pathlib import Path

from data import Example, Splits, Task
from support import read_json

DATA = read_json(Path(__file__).parent / "chores.json")
WRITTEN = read_json(Path(__file__).parent / "chores_descriptions.json")
N_VAL, N_TEST = 32, 100  # chains to validate and to test
N_EXAMPLES = 10  # test examples of a task
WEIGHT = 4  # of a single chore; a chain has 1, as has a chore for any text, with a task for each sort of it

# -------------------- Values --------------------


@cache
def values(name: str, test: bool) -> list[str]:
    """The values of a pool for training, or those for testing."""
    return share(DATA["pools"][name].split(":" if name in ("place", "time") else None), name, test)


def share(texts: list[str], seed: str, test: bool) -> list[str]:
    """Four fifths of them, for training; or the others."""
    random.Random(seed).shuffle(texts)
    n_train = len(texts) * 4 // 5
    return texts[n_train:] if test else texts[:n_train]


class Draw(random.Random):
    """Randomness that picks training values, or test values."""

    def __init__(self, seed: str, test: bool = False):
        super().__init__(f"{seed} {test}")
        self.test = test

    def pick(self, name: str) -> str:
        return self.choice(values(name, self.test))

    def digits(self, n: int) -> str:
        return str(self.randint(10 ** (n - 1), 10**n - 1))


# -------------------- Sorts of input: how to make one, and the form that it has --------------------

VERBS = {}  # {"painted": "paint", ...}
for pair in DATA["pools"]["verb"].split():
    base, past = pair.split(":")
    VERBS[past] = base
PLACES, TIMES = DATA["pools"]["place"].replace(":", "|"), DATA["pools"]["time"].replace(":", "|")
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"


def make_record(d: Draw) -> str:
    fields = {"name": f"{d.pick('first')} {d.pick('last')}", "city": d.pick("city")}
    fields |= {"age": d.randint(18, 89), "job": d.pick("job")}
    return "; ".join(f"{key}: {fields[key]}" for key in d.sample(list(fields), 4))


def make_path(d: Draw) -> str:
    file = d.choice([d.pick("noun"), f"{d.pick('noun')}_{d.pick('noun')}"])
    return f"{d.pick('folder')}/{d.pick('folder')}/{file}.{d.pick('extension')}"


def make_sentence(d: Draw) -> str:
    thing = f"the {d.pick('adjective')} {d.pick('noun')}"
    return f"{d.pick('first')} {d.pick('verb').split(':')[1]} {thing} {d.pick('place')} {d.pick('time')}."


MAKE: dict[str, Callable[[Draw], str]] = {
    "name": lambda d: f"{d.pick('first')} {d.pick('last')}",
    "date": lambda d: str(date(d.randint(1950, 2039), d.randint(1, 12), d.randint(1, 28))),
    "time": lambda d: f"{d.randint(0, 23):02}:{d.randint(1, 59):02}",
    "email": lambda d: f"{d.pick('first')}.{d.pick('last')}@{d.pick('host')}.{d.pick('ending')}".lower(),
    "url": lambda d: f"https://www.{d.pick('noun')}{d.pick('site')}.{d.pick('ending')}"
    f"/{d.pick('folder')}/{d.pick('noun')}",
    "phone": lambda d: f"+{d.digits(2)} {d.digits(d.choice([2, 3]))} {d.digits(d.choice([5, 6, 7]))}",
    "price": lambda d: f"${d.digits(d.randint(1, 3))}.{d.randint(1, 99):02}",
    "measure": lambda d: f"{d.digits(d.randint(1, 3))} {d.choice(list(DATA['units']))}",
    "record": make_record,
    "path": make_path,
    "code": lambda d: f"{d.choice(LETTERS)}{d.choice(LETTERS)}-{d.digits(4)}-{d.choice(LETTERS)}",
    "sentence": make_sentence,
    "words": lambda d: ", ".join(d.sample(values("noun", d.test), d.randint(3, 5))),
}
FORMS = {  # the groups are the parts that chores.json fills in
    "name": r"(?P<first>[A-Z][a-z]+) (?P<last>[A-Z][a-z]+)",
    "date": r"(?P<y>\d{4})-(?P<m>\d\d)-(?P<d>\d\d)",
    "time": r"(?P<h>\d\d):(?P<m>\d\d)",
    "email": r"(?P<user>\w+\.\w+)@(?P<provider>\w+)\.(?P<tld>\w+)",
    "url": r"(?P<protocol>https?)://www\.(?P<site>\w+\.\w+)/(?P<section>\w+)/(?P<page>\w+)",
    "phone": r"\+(?P<country>\d\d) (?P<area>\d+) (?P<number>\d+)",
    "price": r"\$(?P<whole>\d+)\.(?P<cents>\d\d)",
    "measure": rf"(?P<number>\d+) (?P<unit>{'|'.join(DATA['units'])})",
    "record": r"(\w+: [\w ]+; ){3}\w+: [\w ]+",
    "path": r"(?P<top>\w+)/(?P<folder>\w+)/(?P<stem>\w+)\.(?P<type>\w+)",
    "code": r"(?P<letters>[A-Z]{2})-(?P<digits>\d{4})-(?P<last>[A-Z])",
    "sentence": r"(?P<who>[A-Z]\w+) (?P<verb>\w+) (?P<thing>the \w+ \w+)"
    rf"(?P<where> (?P<place>{PLACES}))?(?P<when> (?P<time>{TIMES}))?\.",
    "words": r"[a-z]+(, [a-z]+){1,4}",
}


def sort_of(texts: list[str]) -> str | None:
    """The sort of input that all of these texts have the form of."""
    for sort, form in FORMS.items():
        if all(re.fullmatch(form, text) for text in texts):
            return sort
    return None


# -------------------- What chores do --------------------


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def count(n: str, word: str) -> str:
    """ "1 hour", "2 hours" """
    return f"{int(n)} {word}" if int(n) == 1 else f"{int(n)} {word}s"


def parts_of(sort: str, text: str) -> dict:
    """The parts of a text, under the names that chores.json uses."""
    match = re.fullmatch(FORMS[sort], text) if sort in FORMS else None
    p = {"text": text}
    if match:
        p |= match.groupdict("")
    if sort == "name":
        p["small"] = text.lower().replace(" ", ".")
    elif sort == "date":
        p["day"], p["month"] = int(p["d"]), f"{date.fromisoformat(text):%B}"
    elif sort == "time":
        p["hour"] = (int(p["h"]) + 11) % 12 + 1  # 12-hour clock
        p["half"] = "am" if p["h"] < "12" else "pm"
        p["in_words"] = f"{count(p['h'], 'hour')} {count(p['m'], 'minute')}"
    elif sort == "email":
        p["owner"] = p["user"].replace(".", " ").title()
    elif sort == "price":
        p["in_words"] = f"{count(p['whole'], 'dollar')} and {count(p['cents'], 'cent')}"
    elif sort == "measure":
        unit, p["quantity"] = DATA["units"][p["unit"]]
        p["name"], p["in_words"] = f"{unit}s", count(p["number"], unit)
    elif sort == "record":
        p |= fields_of(text)
    elif sort == "sentence":
        p["base"], p["Time"] = VERBS[p["verb"]], capitalise(p["time"])
    return p


def fields_of(record: str) -> dict[str, str]:
    return dict(field.split(": ") for field in record.split("; "))


def without_field(record: str, key: str) -> str:
    return "; ".join(field for field in record.split("; ") if not field.startswith(key))


def items(text: str) -> list[str]:
    return text.split(", ")


FUNCTIONS: dict[str, Callable[[str], str]] = {  # chores that need more than the parts of their input
    "record-json": lambda s: json.dumps(fields_of(s)),
    "record-values": lambda s: ", ".join(fields_of(s).values()),
    "record-keys": lambda s: ", ".join(fields_of(s)),
    "record-no_age": lambda s: without_field(s, "age"),
    "record-no_city": lambda s: without_field(s, "city"),
    "record-no_job": lambda s: without_field(s, "job"),
    "record-equals": lambda s: s.replace(": ", "="),
    "record-pipes": lambda s: s.replace(";", " |"),
    "record-hide_name": lambda s: s.replace(fields_of(s)["name"], "***"),
    "words-first": lambda s: items(s)[0],
    "words-last": lambda s: items(s)[-1],
    "words-second": lambda s: items(s)[1],
    "words-no_first": lambda s: ", ".join(items(s)[1:]),
    "words-no_last": lambda s: ", ".join(items(s)[:-1]),
    "words-and": lambda s: s.replace(", ", " and "),
    "words-spaces": lambda s: s.replace(",", ""),
    "words-numbered": lambda s: " ".join(f"{i}. {word}" for i, word in enumerate(items(s), 1)),
    "words-hashtags": lambda s: " ".join(f"#{word}" for word in items(s)),
    "words-quoted": lambda s: ", ".join(f'"{word}"' for word in items(s)),
    "words-list": lambda s: json.dumps(items(s)),
    "words-slashes": lambda s: s.replace(", ", "/"),
    "words-ends": lambda s: f"{items(s)[0]}, {items(s)[-1]}",
    "words-reverse": lambda s: ", ".join(items(s)[::-1]),
    "words-semicolons": lambda s: s.replace(",", ";"),
    "any-capitals": str.upper,
    "any-small": str.lower,
    "any-underscores": lambda s: s.replace(" ", "_"),
}
Chain = tuple[str, ...]  # the sort of input, then one or two chores, each as "sort-name"


def right_answer(chain: Chain, text: str) -> str:
    """What the chores of a chain make of a text."""
    for chore in chain[1:]:
        if chore in FUNCTIONS:
            text = FUNCTIONS[chore](text)
        else:
            sort, name = chore.split("-")
            text = DATA["chores"][sort][name].format(**parts_of(sort, text)).strip()
    return text


def answers(chain: Chain, texts: list[str]) -> list[str]:
    return [right_answer(chain, text) for text in texts]


def differ(before: list[str], after: list[str]) -> bool:
    """Whether most of 20 texts have changed."""
    return sum(a != b for a, b in zip(before, after)) > 15


def chores_for(sort: str | None) -> list[str]:
    """The chores for texts of a sort, if they are of one, and those for any text."""
    chores = [f"{sort}-{name}" for name in DATA["chores"].get(sort, {})]
    return chores + [f"any-{name}" for name in DATA["chores"]["any"]]


def inputs_of(sort: str) -> list[str]:
    """20 texts. Two chores count as the same if they give the same answers to them."""
    return [MAKE[sort](Draw(f"{sort} {i}")) for i in range(20)]


def all_chains() -> list[Chain]:
    """All single chores, and all chains of two.

    The second chore fits the sort of the first one's answers. Each chore changes its text. If two chains give
    equal answers, the first one is kept.
    """
    chains = []
    for sort in MAKE:
        inputs = inputs_of(sort)
        known = [answers((sort, chore), inputs) for chore in chores_for(sort)]
        for first in chores_for(sort):
            middle = answers((sort, first), inputs)
            if not differ(inputs, middle):
                continue
            chains.append((sort, first))
            if first.startswith("any"):
                continue
            for second in chores_for(sort_of(middle)):
                last = answers((sort, first, second), inputs)
                is_new = differ(middle, last) and differ(inputs, last) and last not in known
                if is_new and len(set(last)) > 2:
                    chains.append((sort, first, second))
                    known.append(last)
    return chains


def name_of(chain: Chain) -> str:
    """The name of a task: "name-surname-capitals"."""
    sort, *chores = chain
    return "-".join([sort, *(chore.split("-")[1] for chore in chores)])


# -------------------- The tasks --------------------


class LazyList(Sequence):
    """A long sequence whose elements are made when they are asked for: element i is make(i)."""

    def __init__(self, make: Callable[[int], object], length: int = 100_000):
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.make(k) for k in range(*i.indices(self.length))]
        if i >= self.length:
            raise IndexError(i)
        return self.make(i)


def example(chain: Chain, i: int, test: bool = False) -> Example:
    """Example i of a task."""
    text = MAKE[chain[0]](Draw(f"{name_of(chain)} {i}", test=test))
    return Example(text, [right_answer(chain, text)])


def written(part: str, chain: Chain) -> list[str]:
    """Written descriptions of a task, for "train", "val" or "test"."""
    _, *chores = chain
    return WRITTEN[part].get(chores[0] if len(chores) == 1 else name_of(chain), [])


JOINED = ("{x}. Then: {y}", "{x}, then {y}", "First: {x}. After that: {y}", "{x}; {y}")


def description(chain: Chain, i: int) -> str:
    """Training description i of a task: a chain mostly has its own, otherwise those of its chores, joined."""
    rng = random.Random(f"{name_of(chain)} description {i}")
    sort, *chores = chain
    whole = written("train", chain)
    if len(chores) == 1 or (whole and rng.random() < 0.75):
        return rng.choice(whole)
    x, y = [rng.choice(written("train", (sort, chore))) for chore in chores]
    return rng.choice(JOINED).format(x=x.rstrip("."), y=y)


def make_task(chain: Chain, part: str = "train") -> Task:
    """The task as data, with descriptions that were written for this part.

    Training examples and descriptions are drawn afresh in each step.
    """
    descriptions = LazyList(lambda i: description(chain, i)) if part == "train" else written(part, chain)
    return Task(
        f"{name_of(chain)}-voice" if part == "val" else name_of(chain),
        descriptions,
        train=LazyList(lambda i: example(chain, i)),
        test=[example(chain, i, test=True) for i in range(N_EXAMPLES)],
        reworded=written("test", chain),
    )


def load() -> Splits:
    """All tasks by split."""
    chains = all_chains()
    random.Random(0).shuffle(chains)
    single, double, unseen = [], [], []
    for chain in chains:
        if set(chain[1:]) & set(DATA["unseen"]):
            unseen.append(chain)
        elif len(chain) == 2:
            single.append(chain)
        else:
            double.append(chain)
    val, test, train = double[:N_VAL], double[N_VAL : N_VAL + N_TEST], double[N_VAL + N_TEST :]
    single_tasks = [make_task(chain) for chain in single]
    for chain, task in zip(single, single_tasks):
        task.weight = 1 if chain[1].startswith("any") else WEIGHT
    splits = {
        "train": single_tasks + [make_task(chain) for chain in train],
        "val": [make_task(chain) for chain in val],
        "test": [make_task(chain) for chain in test],
        "single": [make_task(chain) for chain in single],
        "unseen": [make_task(chain, "test") for chain in unseen if len(chain) == 2],
    }
    splits["val"] += [make_task(chain, "val") for chain in val + single[:N_VAL]]
    splits["open"] = []
    for i, (sort, request, pairs) in enumerate(read_json(Path(__file__).parent / "chores_open.json")):
        examples = [Example(text, [right]) for text, right in pairs]
        splits["open"].append(Task(f"open-{sort}-{i}", [request], examples, examples))
    return splits
