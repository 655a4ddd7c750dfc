"""A grammar of requests: small programs on short texts, with words and signs that the request names.

A task is a sort of text and a program of one to three steps on its parts:

    date: put the year in square brackets, then a slash before the day
    order: the item, then the count, separated by " | "

The parts of a text have names, so each step can be done to any of them; its words and signs are free. Python
runs the program, so every answer is right by construction. The splits:

    train     programs, some with descriptions that were written one by one, from inputs and outputs alone;
              and the training tasks of chores.py
    val       further programs
    values    programs that differ from training ones in their words and signs only
    words     the same, with words that no training program has
    test      programs of two or three steps; no training program does these steps to these parts
    sorts     programs on two sorts of text that no training program has
    open      requests by people who had seen the texts alone: no programs, some beyond the grammar
    single, chains, unseen
              the splits "single", "test" and "unseen" of chores.py; a program may do the same as one of these

requests.json holds the sorts, the signs, and templates of descriptions, which wording.py fills in;
requests_written.json the written descriptions with their programs; requests_open.json the open requests with
right answers. texts.py makes the texts.
"""

import json
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path

from data import Example, Splits, Task
from support.files import read_file
from tasks import chores
from tasks.chores import LazyList, capitalise
from tasks.texts import Draw, Piece, Text, fill, make_text, parts_of, plain
from tasks.wording import TABLE, from_template, parts_meant

HERE = Path(__file__).parent
N_TRAIN, N_HELD_OUT = 3000, 60  # programs that are drawn for training, and for each other split
N_EXAMPLES = 10  # test examples of a task


def as_program(value):
    """A program from JSON: lists become tuples."""
    return tuple(map(as_program, value)) if isinstance(value, list) else value


WRITTEN = {}  # {program: [description, ...]}
for program, texts in read_file(HERE / "requests_written.json"):
    WRITTEN[as_program(program)] = texts

# -------------------- The steps: a text and values -> a text --------------------


def change(text: Text, part: str, function: Callable[[str], str]) -> Text:
    """The text with a part changed; "all" is the whole text."""
    return [p._replace(text=function(p.text)) if part in ("all", p.part) else p for p in text]


def surround(text: Text, part: str, left: str, right: str) -> Text:
    """The text with something before and behind a part, or before and behind all of it."""
    if part == "all":
        return [Piece(left), *text, Piece(right)]
    pieces = []
    for piece in text:
        pieces += [Piece(left), piece, Piece(right)] if piece.part == part else [piece]
    return pieces


def keep(text: Text, part: str) -> Text:
    return [piece for piece in text if piece.part == part]


def drop(text: Text, part: str) -> Text:
    """Without a part, and without what stands before it; for the first part: behind it."""
    i = [piece.part for piece in text].index(part)
    beside = i + 1 if part == parts_of(text)[0] else i - 1
    gone = {i, beside} if 0 <= beside < len(text) and not text[beside].part else {i}
    return [piece for k, piece in enumerate(text) if k not in gone]


def put(text: Text, part: str, words: str) -> Text:
    """Other words in place of a part."""
    return change(text, part, lambda value: words)


def sign(text: Text, old: str, new: str) -> Text:
    """Another sign in place of one."""
    return change(text, "all", lambda value: value.replace(old, new))


def join(text: Text, mark: str) -> Text:
    """The parts alone, with a sign between them."""
    return build(text, mark.join(f"{{{part}}}" for part in parts_of(text)))


def build(text: Text, form: str) -> Text:
    return fill(form, text)


def as_json(text: Text, parts: tuple[str, ...]) -> Text:
    by_part = {piece.part: piece.text for piece in text}
    return [Piece(json.dumps({part: by_part[part] for part in parts}, ensure_ascii=False))]


def wrap(text: Text, part: str, pair: tuple[str, str]) -> Text:
    return surround(text, part, *pair)


def before(text: Text, part: str, words: str) -> Text:
    return surround(text, part, words, "")


def behind(text: Text, part: str, words: str) -> Text:
    return surround(text, part, "", words)


def case(text: Text, part: str, how: str) -> Text:
    return change(text, part, {"upper": str.upper, "lower": str.lower, "capital": capitalise}[how])


def mask(text: Text, part: str, mark: str, n_kept: int) -> Text:
    """A sign in place of each letter and digit but the last n characters."""

    def hide(value: str) -> str:
        end = len(value) - n_kept
        return re.sub(r"\w", lambda found: mark if found.start() < end else found[0], value)

    return change(text, part, hide)


def blot(text: Text, part: str, mark: str) -> Text:
    """A mark such as *** in place of a part, however long that is."""
    return change(text, part, lambda value: mark)


def swap(text: Text, one: str, other: str) -> Text:
    by_part = {piece.part: piece for piece in text}
    turned = {one: by_part[other], other: by_part[one]}
    return [turned.get(piece.part, piece) for piece in text]


def reverse(text: Text) -> Text:
    """The parts from the last to the first; what stands between them stays."""
    last_first = iter([piece for piece in text if piece.part][::-1])
    return [next(last_first) if piece.part else piece for piece in text]


def cut(text: Text, part: str, n: int) -> Text:
    """The first n characters of a part; of a negative n, the last ones."""
    return change(text, part, lambda value: value[:n] if n > 0 else value[n:])


def spread(text: Text, part: str, mark: str) -> Text:
    """A sign between the characters of a part."""
    return change(text, part, mark.join)


def add(text: Text, part: str, n: int) -> Text:
    """A number plus n, with as many digits as before."""
    return change(text, part, lambda value: str(int(value) + n).zfill(len(value)))


COUNTED = {"letters": r"[^\W\d_]", "digits": r"\d", "characters": r".", "words": r"\w+"}


def count(text: Text, part: str, what: str) -> Text:
    counted = plain(text if part == "all" else keep(text, part))
    return [Piece(str(len(re.findall(COUNTED[what], counted))), "number")]


CHOOSING = (keep, drop, join, swap, reverse, build, as_json)  # come first: they take no account of additions
CHANGING = (put, sign, wrap, before, behind, case, mask, blot, cut, spread, add, count)
STEPS = {step.__name__: step for step in CHOOSING + CHANGING}
OFTEN = dict(keep=12, drop=8, put=5, sign=8, join=3, wrap=7, before=8, behind=8, case=7, mask=4, blot=4)
OFTEN |= dict(swap=4, reverse=2, build=14, as_json=3, cut=3, spread=1, add=3, count=4)

# -------------------- Drawing programs --------------------

Program = tuple  # (sort, (step, values), ...): ("date", ("keep", ("year",)), ("before", ("all", "in ")))
NUMBERS = set("year month day hour age number digits dollars euros count width height home_goals".split())
NUMBERS |= set("away_goals major minor patch value house start end size".split())
MARKS = list(TABLE["signs"])
MASKS = "*#xX•_-?"  # for each letter of a part
BLOTS = "*** ... XXX --- [hidden] ??? ### n/a -".split()  # for a whole part


def run(program: Program, text: Text) -> Text:
    """What a program makes of a text."""
    for step, values in program[1:]:
        text = STEPS[step](text, *values)
    return text


def result(program: Program, text: Text) -> str | None:
    """The same as a string; None if the text lacks a part, as a short list of words may, or a number."""
    try:
        return plain(run(program, text))
    except (KeyError, ValueError):
        return None


def draw_words(d: Draw) -> str:
    """Free words: a label, a word, two words."""
    words = d.choice([d.pick("word"), d.pick("word"), d.pick("label"), f"{d.pick('word')} {d.pick('word')}"])
    if words.islower():
        words = d.choice([str.lower, capitalise, capitalise, str.upper])(words)
    return words + d.choice(["", "", ":", ":", "!", " =", " -"])


def draw_form(parts: list[str], d: Draw) -> str:
    """A line with these parts and free words or signs around them, such as "Dear {first} ({city})!"."""
    marks, form = [mark for mark in MARKS if mark], ""
    between = d.choice(marks)  # mostly the same
    for i, part in enumerate(parts):
        if i:
            form += d.choice([between, between, d.choice(marks), ", ", " ", f" {draw_words(d)} "])
        left, right, _ = d.choice(TABLE["pairs"])
        form += f"{left}{{{part}}}{right}" if d.random() < 0.15 else f"{{{part}}}"
    start = d.choice(["", "", f"{draw_words(d)} ", d.choice(marks).lstrip()])
    end = d.choice(["", "", "", f" {draw_words(d)}", ".", "!", "?", ",", ";"])
    return start + form + end


def draw_values(step: str, text: Text, d: Draw) -> tuple | None:
    """Values for a step on such a text; None if it has none."""
    parts = parts_of(text)
    several = len(parts) > 1
    part = d.choice(parts)
    part_or_all = d.choice([part, part, "all"]) if several else "all"
    marks = [mark for mark in MARKS if mark]
    if step in ("keep", "drop") and several:
        return (part,)
    if step == "put" and several:
        return part, d.choice([draw_words(d).rstrip(":!=- "), d.digits(2)])
    if step == "sign":
        between = "".join(piece.text for piece in text if not piece.part)
        old = [mark for mark in marks if len(mark) == 1 and mark in between]
        return (d.choice(old), d.choice(MARKS)) if old else None
    if step == "join" and several:
        return (d.choice(marks),)
    if step == "build" and several:
        return (draw_form(d.sample(parts, min(len(parts), d.choice([1, 2, 2, 2, 3, 4]))), d),)
    if step == "as_json" and several:
        return (tuple(d.sample(parts, min(len(parts), d.choice([2, 3])))),)
    if step == "wrap":
        return part_or_all, tuple(d.choice(TABLE["pairs"])[:2])
    if step in ("before", "behind"):  # a sign, or words and a space
        words = draw_words(d)
        spaced = f"{words} " if step == "before" else f" {words}"
        return part_or_all, d.choice([spaced, spaced, d.choice([m for m in marks if m == m.strip()])])
    if step == "case":
        return part_or_all, d.choice(["upper", "lower", "capital"])
    if step == "mask":
        return part, d.choice(MASKS), d.choice([0, 0, 1, 2, 3, 4])
    if step == "blot":
        return part, d.choice(BLOTS)
    if step == "swap" and several:
        return tuple(d.sample(parts, 2))
    if step == "reverse" and several:
        return ()
    if step == "cut":
        return part, d.choice([1, 2, 3, -1, -2, -3])
    if step == "spread":
        return part, d.choice("-./_* ")
    numbers = [part for part in parts if part in NUMBERS]
    if step == "add" and numbers:
        return d.choice(numbers), d.choice([1, 1, -1, 2, -2, 5, 10])
    if step == "count":
        return part_or_all, d.choice(list(COUNTED))
    return None


def draw_program(sort: str, n_steps: int, d: Draw) -> Program:
    """A program of n steps, each of which matters for most texts."""
    samples = [make_text(sort, Draw(f"{sort} {i}")) for i in range(4)]
    while True:
        program, text = (sort,), samples[0]
        for _ in range(n_steps):
            (step,) = d.choices(list(OFTEN), list(OFTEN.values()))
            values = draw_values(step, text, d) if parts_of(text) else None
            if values is not None:
                program = (*program, (step, values))
                text = run(program, samples[0]) if result(program, samples[0]) else []
        if len(program) == n_steps + 1 and is_sensible(program, samples):
            return program


def is_sensible(program: Program, samples: list[Text]) -> bool:
    """Whether it chooses before it changes, and gives something else without any of its steps."""
    steps = [STEPS[step] for step, _ in program[1:]]
    if any(a in CHANGING and b in CHOOSING for a, b in zip(steps, steps[1:])) or count in steps[:-1]:
        return False
    results = [result(program, text) for text in samples]
    if not all(results) or len(set(results)) < 3:
        return False
    for i in range(1, len(program)):
        shorter = program[:i] + program[i + 1 :]
        if sum(result(shorter, text) == right for text, right in zip(samples, results)) > 1:
            return False
    return True


def shape(program: Program) -> tuple:
    """A program without its words and signs: the steps, and the parts they are done to."""
    sort, *steps = program
    return (sort, *((step, parts_meant(step, values)) for step, values in steps))


# -------------------- The tasks --------------------


def name_of(program: Program) -> str:
    """The name of a task, such as "date-keep-wrap-5f3c8a01"."""
    sort, *steps = program
    return "-".join([sort, *(step for step, _ in steps), f"{zlib.crc32(repr(program).encode()):08x}"])


def example(program: Program, i: int, test: bool = False) -> Example:
    """Example i of a task. A list of words may be too short for it: then a longer one is drawn."""
    d = Draw(f"{name_of(program)} {i}", test)
    while (answer := result(program, text := make_text(program[0], d))) is None:
        pass
    return Example(plain(text), [answer])


def make_task(program: Program) -> Task:
    """The task as data. Descriptions are from templates; if there are written ones, two thirds are these."""
    written = WRITTEN.get(program, [])

    def description(i: int) -> str:
        rng = random.Random(f"{name_of(program)} description {i}")
        return rng.choice(written) if written and rng.random() < 2 / 3 else from_template(program, rng)

    return Task(
        name_of(program),
        descriptions=LazyList(description),
        train=LazyList(lambda i: example(program, i)),
        test=[example(program, i, test=True) for i in range(N_EXAMPLES)],
    )


def draw_programs(seed: str, n: int, sorts: list[str], steps: list[int], fits, test=False) -> list[Program]:
    """n different programs for which fits(program) is true; with `test` they have test words."""
    d, programs = Draw(seed, test), {}
    while len(programs) < n:
        program = draw_program(d.choice(sorts), d.choice(steps), d)
        if fits(program):
            programs[program] = None
    return list(programs)


def free_words(program: Program) -> list[str]:
    """The words that it adds to a text."""
    values = [values[1] for step, values in program[1:] if step in ("put", "before", "behind")]
    return [words for words in values if words not in MARKS and not words.isdigit()]


def programs() -> dict[str, list[Program]]:
    """The programs of all splits."""
    withheld = TABLE["withheld"]
    sorts = [sort for sort in TABLE["sorts"] if sort not in withheld]
    train = list(WRITTEN)
    train += draw_programs("train", N_TRAIN, sorts, [1, 1, 2, 2, 3], lambda program: program not in WRITTEN)
    trained, shapes = set(train), {shape(program) for program in train}

    def is_new(program: Program) -> bool:
        return program not in trained

    def is_known(program: Program) -> bool:
        """Whether it is new in its words and signs only."""
        return is_new(program) and shape(program) in shapes

    n = N_HELD_OUT
    return {
        "train": train,
        "val": draw_programs("val", n, sorts, [1, 1, 2, 2, 3], is_new),
        "values": draw_programs("values", n, sorts, [1], is_known),
        "words": draw_programs("words", n, sorts, [1], lambda p: is_known(p) and free_words(p), test=True),
        "test": draw_programs("test", n, sorts, [2, 2, 3], lambda p: shape(p) not in shapes),
        "sorts": draw_programs("sorts", n, withheld, [1, 1, 2], is_new),
    }


def load() -> Splits:
    """All tasks by split."""
    splits = {split: list(map(make_task, drawn)) for split, drawn in programs().items()}
    splits["open"] = []
    for i, (sort, request, pairs) in enumerate(read_file(HERE / "requests_open.json")):
        examples = [Example(text, [answer]) for text, answer in pairs]
        splits["open"].append(Task(f"open-{sort}-{i}", [request], examples, examples))
    of_chores = chores.load()
    splits["train"] += of_chores["train"]
    for split, its_name in (("single", "single"), ("chains", "test"), ("unseen", "unseen")):
        splits[split] = of_chores[its_name]
    return splits
