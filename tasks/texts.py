"""Short texts in pieces for requests.py: the pieces that matter have names, the parts.

    a date, "{year}-{month}-{day}":  2031-05-17  =  year 2031, "-", month 05, "-", day 17

The forms of all sorts are in requests.json; the values are those of chores.json and a few more.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from tasks import chores
from tasks.chores import LETTERS, UNITS
from tasks.wording import TABLE

# -------------------- A text in pieces --------------------


class Piece(NamedTuple):
    """A part of a text with its name, such as "year", or what stands between parts."""

    text: str
    part: str = ""  # "" between parts


Text = list[Piece]


def plain(text: Text) -> str:
    return "".join(piece.text for piece in text)


def parts_of(text: Text) -> list[str]:
    """The names of its parts, in order."""
    return [piece.part for piece in text if piece.part]


def fill(form: str, text: Text) -> Text:
    """A text of a form such as "{last}, {first}", with the parts of another text."""
    pieces, by_part = [], {piece.part: piece for piece in text}
    for i, token in enumerate(re.split(r"\{(\w+)\}", form)):
        if i % 2:
            pieces.append(by_part[token])
        elif token:
            pieces.append(Piece(token))
    return pieces


# -------------------- Drawing texts --------------------


@cache
def pool(name: str, test: bool) -> list[str]:
    """The values of a pool for training, or those for testing."""
    if name == "word":  # the written programs have none of the test words
        return TABLE["pools"]["word"]["test" if test else "train"]
    if name in TABLE["pools"]:
        return chores.part_of(list(TABLE["pools"][name]), name, test)
    return chores.pool(name, test)


class Draw(chores.Draw):
    """Randomness that picks training values, or test values."""

    def pick(self, name: str) -> str:
        return self.choice(pool(name, self.test))

    def number(self, least: int, most: int, width: int = 1) -> str:
        return str(self.randint(least, most)).zfill(width)

    def digits(self, *lengths: int) -> str:
        return super().digits(self.choice(lengths))


FIELDS: dict[str, Callable[[Draw], str]] = {  # values that are not those of a pool
    "name": lambda d: f"{d.pick('first')} {d.pick('last')}",
    "who": lambda d: d.pick("first"),
    "user": lambda d: f"{d.pick('first')}.{d.pick('last')}".lower(),
    "provider": lambda d: d.pick("host"),
    "protocol": lambda d: "https",
    "site": lambda d: f"{d.pick('noun')}{d.pick('site')}.{d.pick('ending')}",
    "section": lambda d: d.pick("folder"),
    "page": lambda d: d.pick("noun"),
    "file": lambda d: d.choice([d.pick("noun"), f"{d.pick('noun')}_{d.pick('noun')}"]),
    "type": lambda d: d.pick("extension"),
    "verb": lambda d: d.pick("verb").split(":")[1],
    "thing": lambda d: f"the {d.pick('adjective')} {d.pick('noun')}",
    "letters": lambda d: d.choice(LETTERS) + d.choice(LETTERS),
    "letter": lambda d: d.choice(LETTERS),
    "unit": lambda d: d.choice(list(UNITS)),
    "year": lambda d: d.number(1950, 2039),
    "month": lambda d: d.number(1, 12, 2),
    "day": lambda d: d.number(1, 28, 2),
    "date_day": lambda d: d.number(1, 28),
    "hour": lambda d: d.number(0, 23, 2),
    "minute": lambda d: d.number(1, 59, 2),
    "day_hour": lambda d: d.number(6, 22),
    "age": lambda d: d.number(18, 89),
    "few": lambda d: d.number(2, 30),
    "goal": lambda d: d.number(0, 8),
    "cents": lambda d: d.number(1, 99, 2),
    "short": lambda d: d.digits(1, 2, 3),
    "country": lambda d: d.digits(2),
    "area": lambda d: d.digits(2, 3),
    "digits": lambda d: d.digits(4),
    "zip": lambda d: d.digits(5),
    "number": lambda d: d.digits(5, 6, 7),
}


def make_text(sort: str, d: Draw) -> Text:
    """A text of a sort. Its form names the parts, "{year}", and of some the field: "{size:short}"."""
    form = TABLE["sorts"][sort]["form"]
    if sort == "record":
        form = "; ".join(f"{key}: {{{key}}}" for key in d.sample(["name", "city", "age", "job"], 4))
    if sort == "words":
        parts = ["first", *["second", "third", "fourth"][: d.randint(1, 3)], "last"]
        nouns = d.sample(pool("noun", d.test), len(parts))
        return fill(", ".join(f"{{{part}}}" for part in parts), list(map(Piece, nouns, parts)))
    pieces = []
    for part, field in re.findall(r"\{(\w+):?(\w*)\}", form):
        make = FIELDS.get(field or part) or (lambda d, name=field or part: d.pick(name))
        pieces.append(Piece(make(d), part))
    return fill(re.sub(r":\w+\}", "}", form), pieces)
