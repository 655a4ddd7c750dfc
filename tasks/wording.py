"""Descriptions of the programs of requests.py, from the templates of requests.json."""

import random
import re
from pathlib import Path

from support.files import read_file
from tasks.chores import DATA, capitalise

TABLE = read_file(Path(__file__).parent / "requests.json")
FRAMES = DATA["frames"]


def parts_meant(step: str, values: tuple) -> tuple[str, ...]:
    """The parts that a step names."""
    if step == "build":
        return tuple(re.findall(r"\{(\w+)\}", values[0]))
    if step == "as_json":
        return values[0]
    if step == "swap":
        return values
    return () if step in ("sign", "join", "reverse") else values[:1]


def expand(pattern: str, rng: random.Random) -> str:
    """One of the texts that a pattern with choices [a|b] stands for."""
    while match := re.search(r"\[([^\[\]]*\|[^\[\]]*)\]", pattern):
        pattern = pattern[: match.start()] + rng.choice(match[1].split("|")) + pattern[match.end() :]
    return " ".join(pattern.split())


def say_words(words: str, rng: random.Random) -> str:
    """Free words as people write them: mostly in quotes."""
    if words in TABLE["signs"]:
        return say_sign(words, rng)
    words = words.strip()
    if re.fullmatch(r"[\w.]+", words) and rng.random() < 0.5:
        return words
    return rng.choice([f'"{words}"', f'"{words}"', f"'{words}'"])


def say_sign(mark: str, rng: random.Random, article: bool = True) -> str:
    """A sign as people call it: "a dash", without article "dash"; or the sign itself in quotes."""
    if mark not in TABLE["signs"] or (mark and rng.random() < 0.3):
        return f'"{mark}"'
    name = rng.choice(TABLE["signs"][mark])
    return name if article else re.sub("^an? ", "", name)


def say_form(form: str, names: list[str], rng: random.Random) -> str:
    """A form in words, "the surname, then a dash, then the age", or as a pattern, "<surname>-<age>"."""
    said, names, is_pattern = [], iter(names), rng.random() < 0.3
    for i, token in enumerate(re.split(r"\{\w+\}", form)):
        if i:
            name = next(names)
            said.append(f"<{name.removeprefix('the ')}>" if is_pattern else name)
        if token:
            said.append(token if is_pattern else say_words(token, rng))
    return f'"{"".join(said)}"' if is_pattern else ", then ".join(said)


def say_step(sort: str, step: str, values: tuple, x: str, rng: random.Random, is_order: bool) -> str:
    """A request to do one step to x; is_order: as an order, so that it fits into any frame."""

    def name(part: str) -> str:
        return x if part == "all" else rng.choice(TABLE["sorts"][sort]["parts"][part])

    key, slots, names = step, {"x": x}, [name(part) for part in parts_meant(step, values)]
    first, *others = values or ("",)
    if step == "swap":
        slots |= {"one": names[0], "other": names[1]}
    elif step == "build":
        slots["form"] = say_form(first, names, rng)
    elif step == "as_json":
        slots["parts"] = f"{', '.join(names[:-1])} and {names[-1]}"
    elif names:
        slots["part"] = names[0]
    if step in ("put", "before", "behind"):
        slots["words"] = say_words(others[0], rng)
    elif step == "sign":
        key = "sign" if others[0] else "unsign"
        slots |= {"old": say_sign(first, rng, article=False), "new": say_sign(others[0], rng)}
    elif step == "join":
        slots["sign"] = say_sign(first, rng)
    elif step == "wrap":
        left, right = others[0]
        (names,) = [names for *pair, names in TABLE["pairs"] if pair == [left, right]]
        slots["pair"] = rng.choice([*names, f"{left} and {right}"])
    elif step == "case":
        slots["how"] = rng.choice(TABLE["cases"][others[0]])
    elif step == "mask":
        n = others[1]
        kept = [f", but not the last {n}", f" and leave the last {n}", f" except for the last {n}"]
        slots |= {"mark": rng.choice([f'"{others[0]}"', others[0]]), "kept": rng.choice(kept) if n else ""}
    elif step in ("blot", "spread"):
        slots["mark"] = say_sign(others[0], rng)
    elif step in ("cut", "add"):
        key, slots["n"] = f"{step}_{'more' if others[0] > 0 else 'less'}", abs(others[0])
    elif step == "count":
        slots["what"] = others[0]
    patterns = TABLE["say"][key]["order"] + ([] if is_order else TABLE["say"][key].get("other", []))
    return expand(rng.choice(patterns), rng).format(**slots)  # choices first: the words may hold brackets


def from_template(program: tuple, rng: random.Random) -> str:
    """One description of a program."""
    sort, *steps = program
    noun, is_order, said = rng.choice(TABLE["sorts"][sort]["nouns"]), rng.random() < 0.6, []
    for i, (step, values) in enumerate(steps):
        x = noun if i == 0 or rng.random() < 0.2 else rng.choice(["it", "that", "the result"])
        said.append(say_step(sort, step, values, x, rng, is_order))
    if is_order:
        x, y = said[0], ", then ".join(said[1:])
        frame = rng.choice(FRAMES["two" if y else "one"])
        return frame.format(x=x, X=capitalise(x), y=y, input=noun)
    between = rng.choice([". ", "; ", ", then ", " - "])
    text = between.join(map(capitalise, said) if between == ". " else said)
    return rng.choice([text, capitalise(text), capitalise(text) + ("" if text.endswith("?") else ".")])
