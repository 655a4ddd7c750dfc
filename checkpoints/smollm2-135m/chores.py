"""Write text chores as a folder of task files, to train Text-to-LoRA for a real model on.

    python checkpoints/smollm2-135m/chores.py out/chores

A chore does one thing to one kind of text: "Give the surname.", "Convert the date to DD.MM.YYYY." A task is
one chore, or a chain of two: "Give the domain of the e-mail address, then write it in capitals." The folder
holds training, validation and test tasks (chains that no training task has), the test tasks' descriptions in
withheld wording (reworded.json), and two folders more, of test tasks only:

    unseen/         chores that are in no training task, neither alone nor in a chain
    handwritten/    the tasks that the descriptions of assets/chores_handwritten.json ask for

Phrases, and the values of the inputs, are in assets/chores.json. A fifth of each list of values (of names,
places, words, ...) is for test examples only. All values are made up.
"""

import json
import random
import re
import sys
from datetime import date
from functools import cache
from pathlib import Path
from typing import Callable

ASSETS = Path(__file__).parents[2] / "assets"
DATA = json.loads((ASSETS / "chores.json").read_text(encoding="utf-8"))
N_CHAINS, N_VAL, N_TEST_CHAINS = 1200, 32, 100
COPIES = 4  # of the tasks of one chore, since chains are learnt from them
N_TRAIN, N_TEST, N_DESCRIPTIONS = 40, 10, 24  # examples and descriptions of a task

# -------------------- Values --------------------

@cache
def pool(name: str, test: bool) -> list[str]:
    """The values of a pool for training, or those for testing."""
    text = DATA["pools"][name]
    values = text.split(":") if name in ("place", "time") else text.split()
    random.Random(name).shuffle(values)
    n_train = len(values) * 4 // 5
    return values[n_train:] if test else values[:n_train]

class Draw(random.Random):
    """Randomness that picks training values or test values."""

    def __init__(self, seed: str, test: bool = False):
        super().__init__(f"{seed} {test}")
        self.test = test

    def pick(self, name: str) -> str:
        return self.choice(pool(name, self.test))

    def digits(self, n: int) -> str:
        return str(self.randint(10 ** (n - 1), 10**n - 1))

# -------------------- Kinds of input: how to make one, and the form that tells the kind --------------------

UNITS = dict(kg="kilogram", g="gram", km="kilometer", m="meter", cm="centimeter", mm="millimeter")
UNITS |= dict(l="liter", ml="milliliter", h="hour", min="minute", s="second")
MEASURED = dict(kg="weight", g="weight", l="volume", ml="volume", h="time", min="time", s="time")  # or length
BASES = dict(pair.split(":")[::-1] for pair in DATA["pools"]["verb"].split())  # {"painted": "paint"}
PLACES, TIMES = (DATA["pools"][name].replace(":", "|") for name in ("place", "time"))
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"

def email(d: Draw) -> str:
    return f"{d.pick('first')}.{d.pick('last')}@{d.pick('host')}.{d.pick('ending')}".lower()

def url(d: Draw) -> str:
    host = f"www.{d.pick('noun')}{d.pick('site')}.{d.pick('ending')}"
    return f"https://{host}/{d.pick('folder')}/{d.pick('noun')}"

def phone(d: Draw) -> str:
    return f"+{d.digits(2)} {d.digits(d.choice([2, 3]))} {d.digits(d.choice([5, 6, 7]))}"

def record(d: Draw) -> str:
    fields = dict(name=f"{d.pick('first')} {d.pick('last')}", city=d.pick("city"))
    fields |= dict(age=d.randint(18, 89), job=d.pick("job"))
    return "; ".join(f"{key}: {fields[key]}" for key in d.sample(list(fields), 4))

def path(d: Draw) -> str:
    file = d.choice([d.pick("noun"), f"{d.pick('noun')}_{d.pick('noun')}"])
    return f"{d.pick('folder')}/{d.pick('folder')}/{file}.{d.pick('extension')}"

def code(d: Draw) -> str:
    return f"{d.choice(LETTERS)}{d.choice(LETTERS)}-{d.digits(4)}-{d.choice(LETTERS)}"

def sentence(d: Draw) -> str:
    thing = f"the {d.pick('adjective')} {d.pick('noun')}"
    return f"{d.pick('first')} {d.pick('verb').split(':')[1]} {thing} {d.pick('place')} {d.pick('time')}."

KINDS: dict[str, tuple[Callable, str]] = {
    "name": (
        lambda d: f"{d.pick('first')} {d.pick('last')}",
        r"(?P<first>[A-Z][a-z]+) (?P<last>[A-Z][a-z]+)",
    ),
    "date": (
        lambda d: str(date(d.randint(1950, 2039), d.randint(1, 12), d.randint(1, 28))),
        r"(?P<y>\d{4})-(?P<m>\d\d)-(?P<d>\d\d)",
    ),
    "time": (lambda d: f"{d.randint(0, 23):02}:{d.randint(1, 59):02}", r"(?P<h>\d\d):(?P<m>\d\d)"),
    "email": (email, r"(?P<user>\w+\.\w+)@(?P<provider>\w+)\.(?P<tld>\w+)"),
    "url": (url, r"(?P<protocol>https?)://www\.(?P<site>\w+\.\w+)/(?P<section>\w+)/(?P<page>\w+)"),
    "phone": (phone, r"\+(?P<country>\d\d) (?P<area>\d+) (?P<number>\d+)"),
    "price": (
        lambda d: f"${d.digits(d.randint(1, 3))}.{d.randint(1, 99):02}",
        r"\$(?P<whole>\d+)\.(?P<cents>\d\d)",
    ),
    "measure": (
        lambda d: f"{d.digits(d.randint(1, 3))} {d.choice(list(UNITS))}",
        rf"(?P<number>\d+) (?P<unit>{'|'.join(UNITS)})",
    ),
    "record": (record, r"(\w+: [\w ]+; ){3}\w+: [\w ]+"),
    "path": (path, r"(?P<top>\w+)/(?P<folder>\w+)/(?P<stem>\w+)\.(?P<type>\w+)"),
    "code": (code, r"(?P<letters>[A-Z]{2})-(?P<digits>\d{4})-(?P<last>[A-Z])"),
    "sentence": (
        sentence,
        r"(?P<who>[A-Z]\w+) (?P<verb>\w+) (?P<thing>the \w+ \w+)"
        rf"(?P<where> (?P<place>{PLACES}))?(?P<when> (?P<time>{TIMES}))?\.",
    ),
    "words": (lambda d: ", ".join(d.sample(pool("noun", d.test), d.randint(3, 5))), r"[a-z]+(, [a-z]+){1,4}"),
}

def big(text: str) -> str:
    """With a capital at the start."""
    return text[:1].upper() + text[1:]

def count(n: str, word: str) -> str:
    """ "1 hour", "2 hours" """
    return f"{int(n)} {word}{'s' * (int(n) != 1)}"

def parts(kind: str, text: str) -> dict:
    """The parts of a text of a kind, under the names that assets/chores.json uses."""
    match = re.fullmatch(KINDS[kind][1], text) if kind in KINDS else None
    p = {"text": text} | (match.groupdict("") if match else {})
    if kind == "name":
        p["small"] = text.lower().replace(" ", ".")
    elif kind == "date":
        p |= dict(day=int(p["d"]), month=f"{date.fromisoformat(text):%B}")
    elif kind == "time":
        p |= dict(hour=(int(p["h"]) + 11) % 12 + 1, half="am" if p["h"] < "12" else "pm")
        p["in_words"] = f"{count(p['h'], 'hour')} {count(p['m'], 'minute')}"
    elif kind == "email":
        p["owner"] = p["user"].replace(".", " ").title()
    elif kind == "price":
        p["in_words"] = f"{count(p['whole'], 'dollar')} and {count(p['cents'], 'cent')}"
    elif kind == "measure":
        p |= dict(name=UNITS[p["unit"]] + "s", quantity=MEASURED.get(p["unit"], "length"))
        p["in_words"] = count(p["number"], UNITS[p["unit"]])
    elif kind == "record":
        p |= fields(text)
    elif kind == "sentence":
        p |= dict(base=BASES[p["verb"]], Time=big(p["time"]))
    return p

# -------------------- Chores that need more than the parts of their input --------------------

def fields(s: str) -> dict[str, str]:
    return dict(field.split(": ") for field in s.split("; "))

def without(s: str, key: str) -> str:
    return "; ".join(field for field in s.split("; ") if not field.startswith(key))

def items(s: str) -> list[str]:
    return s.split(", ")

FUNCTIONS: dict[str, Callable[[str], str]] = {
    "record-json": lambda s: json.dumps(fields(s)),
    "record-values": lambda s: ", ".join(fields(s).values()),
    "record-keys": lambda s: ", ".join(fields(s)),
    "record-no_age": lambda s: without(s, "age"),
    "record-no_city": lambda s: without(s, "city"),
    "record-no_job": lambda s: without(s, "job"),
    "record-equals": lambda s: s.replace(": ", "="),
    "record-pipes": lambda s: s.replace(";", " |"),
    "record-hide_name": lambda s: s.replace(fields(s)["name"], "***"),
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
Chain = tuple[str, ...]  # the kind of input, then chores as "kind-chore"

def phrases(chore: str) -> dict:
    """What assets/chores.json says of a chore."""
    kind, name = chore.split("-")
    return DATA["chores"][kind][name]

def answer(chain: Chain, text: str) -> str:
    """What the chores of a chain make of a text."""
    for chore in chain[1:]:
        if chore in FUNCTIONS:
            text = FUNCTIONS[chore](text)
        else:
            text = phrases(chore)["does"].format(**parts(chore.split("-")[0], text)).strip()
    return text

def kind_of(texts: list[str]) -> str | None:
    """The kind of input that all of these texts have the form of."""
    for kind, (_, form) in KINDS.items():
        if all(re.fullmatch(form, text) for text in texts):
            return kind
    return None

def chores_of(kind: str | None) -> list[str]:
    """The chores for texts of a kind, those for any text included."""
    return [f"{k}-{name}" for k in (kind, "any") if k for name in DATA["chores"][k]]

def all_chains() -> list[Chain]:
    """All single chores, and all chains of two: a chore for the kind, then one for any text, or for the kind
    that the first one's answers are of. Each changes its text; of chains with equal answers one is kept."""
    chains = []
    for kind, (make, _) in KINDS.items():
        inputs = [make(Draw(f"{kind} {i}")) for i in range(20)]
        changes = lambda before, after: sum(a != b for a, b in zip(before, after)) > 15
        known = [[answer((kind, chore), text) for text in inputs] for chore in chores_of(kind)]
        for first in chores_of(kind):
            results = [answer((kind, first), text) for text in inputs]
            if not changes(inputs, results):
                continue
            chains.append((kind, first))
            for second in [] if first.startswith("any") else chores_of(kind_of(results)):
                last = [answer((kind, first, second), text) for text in inputs]
                new = changes(results, last) and changes(inputs, last) and last not in known
                if new and len(set(last)) > 2:
                    chains.append((kind, first, second))
                    known.append(last)
    return chains

def name_of(chain: Chain) -> str:
    """The name of a task: "name-surname-capitals"."""
    return "-".join([chain[0], *(chore.split("-")[1] for chore in chain[1:])])

# -------------------- Descriptions --------------------

def expand(text: str, x: str, part: str, rng: random.Random) -> str:
    """One of the texts that a pattern stands for: macros replaced, {x} filled in, choices [a|b] made."""
    for macro, pattern in DATA["macros"][part].items():
        text = text.replace(f"{{{macro}}}", pattern)
    text = text.replace("{x}", x)
    while match := re.search(r"\[([^\[\]]*\|[^\[\]]*)\]", text):
        text = text[: match.start()] + rng.choice(match[1].split("|")) + text[match.end() :]
    return " ".join(text.split())

def say(chore: str, x: str, part: str, rng: random.Random, nested: bool = False) -> str:
    """An instruction to do one chore to x; if x is nested, one that names x."""
    patterns = phrases(chore)["withheld" if part == "withheld" else "say"]
    if part == "seen" and not nested:
        patterns = patterns + [f"{{give}} {noun}{{of}}" for noun in phrases(chore).get("noun", [])]
    return expand(rng.choice([p for p in patterns if "{x}" in p or not nested]), x, part, rng)

def describe(chain: Chain, rng: random.Random, part: str = "seen") -> str:
    """One description of a task: `part` is "seen" or "withheld"."""
    kind, first, *rest = chain
    source, it = rng.choice(DATA["nouns"][kind][part]), rng.choice(DATA["nouns"]["it"][part])
    nouns = phrases(first).get("noun")
    if rest and rest[0].startswith("any") and nouns and part == "seen" and rng.random() < 0.5:
        noun = expand(rng.choice(nouns), "", part, rng)  # "write the surname in capitals"
        x, rest = say(rest[0], noun, part, rng, nested=True), []
    else:
        x = say(first, rng.choice([source, source, "it"]), part, rng)
    y = say(rest[0], it, part, rng) if rest else ""
    frame = rng.choice(DATA["frames"][part]["two" if rest else "one"])
    return frame.format(x=x, X=big(x), y=y, input=source)

# -------------------- The folders --------------------

def write(folder: Path, splits: dict[str, list[Chain]], descriptions: dict[str, list[str]]) -> None:
    """A folder of task files. A training task of one chore (for its kind) is written COPIES times."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {split: [] for split in splits}
    for split, chain in ((split, chain) for split in splits for chain in splits[split]):
        single = len(chain) == 2 and not chain[1].startswith("any")
        for copy in range(COPIES if split == "train" and single else 1):
            name, make = name_of(chain) + f".{copy}" * bool(copy), KINDS[chain[0]][0]
            rng = random.Random(name)
            inputs = [make(Draw(f"{name} {i}")) for i in range(N_TRAIN)]
            inputs += [make(Draw(f"{name} {i}", test=True)) for i in range(N_TEST)]
            texts = descriptions.get(name) or [describe(chain, rng) for _ in range(N_DESCRIPTIONS)]
            examples = [{"input": text, "output": [answer(chain, text)]} for text in inputs]
            content = dict(name=name, descriptions=texts, Instances=examples)
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
            names[split].append(name)
    (folder / "splits.json").write_text(json.dumps(names, indent=1))

def main(folder: Path) -> None:
    chains = all_chains()
    random.Random(0).shuffle(chains)
    unseen = [chain for chain in chains if set(chain[1:]) & set(DATA["unseen"])]
    single = [chain for chain in chains if len(chain) == 2 and chain not in unseen]
    double = [chain for chain in chains if len(chain) == 3 and chain not in unseen]
    val, rest = double[:N_VAL], double[N_VAL:]
    test, train = rest[:N_TEST_CHAINS], rest[N_TEST_CHAINS:][:N_CHAINS]
    write(folder, {"train": single + train, "val": val, "test": test}, {})

    rng, reworded = random.Random(1), {}
    for chain in test:
        reworded[name_of(chain)] = [describe(chain, rng, "withheld") for _ in range(N_DESCRIPTIONS)]
    (folder / "reworded.json").write_text(json.dumps(reworded, indent=1))
    write(folder / "unseen", {"test": [chain for chain in unseen if len(chain) == 2]}, {})
    handwritten = json.loads((ASSETS / "chores_handwritten.json").read_text(encoding="utf-8"))
    asked = [chain for chain in chains if name_of(chain) in handwritten]
    write(folder / "handwritten", {"test": asked}, handwritten)
    print(f"{len(single)} single chores and {len(train)} chains of {len(double)} to train on, in {folder}/")

if __name__ == "__main__":
    main(Path(sys.argv[1]))
