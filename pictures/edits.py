"""The world of pictures.py: scenes of coloured shapes, edits made of three parts, and their descriptions."""

import random
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import read_json

SIZE, PATCH = 24, 4  # pixels of a picture, and of the patches that the transformer sees
OBJECT = 2 * PATCH  # of an object, which lies on whole patches
COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (0.95, 0.85, 0.1),
    "purple": (0.65, 0.25, 0.8),
    "orange": (1.0, 0.55, 0.1),
    "white": (1.0, 1.0, 1.0),  # to paint with only
}
BACKGROUNDS = [(0.05, 0.05, 0.05), (0.05, 0.1, 0.3), (0.3, 0.08, 0.1), (0.05, 0.22, 0.12), (0.3, 0.25, 0.1)]
x, y = np.meshgrid(np.linspace(-1, 1, OBJECT), np.linspace(-1, 1, OBJECT))  # [8, 8]; y points down
radius = np.hypot(x, y)
SHAPES = {
    "circle": radius < 1.1,
    "square": np.maximum(abs(x), abs(y)) < 0.8,
    "triangle": 2 * abs(x) <= y + 1,
    "cross": np.minimum(abs(x), abs(y)) < 0.3,
    "diamond": abs(x) + abs(y) <= 1.15,
    "ring": (radius < 1.1) & (radius > 0.6),
    "moon": (radius < 1.1) & (np.hypot(x - 0.6, y) > 0.8),
    "heart": (np.hypot(abs(x) - 0.5, y + 0.5) < 0.55) | ((abs(x) + y < 0.9) & (y > -0.5)),
    "hourglass": abs(x) <= abs(y),
    "corner": (x < -0.4) | (y > 0.4),
}


class Object(NamedTuple):
    shape: str
    colour: str
    row: int  # of its upper left corner
    column: int


class Scene(NamedTuple):
    background: tuple[float, float, float]
    objects: list[Object]


class Edit(NamedTuple):
    """What is done to a scene, in three parts."""

    which: str  # the objects that are meant: a shape or a colour
    how: str  # what happens to them
    whole: str  # what happens to the whole picture


WHICH = [*SHAPES, *list(COLOURS)[:6]]
HOW = ["remove", "keep", "paint green", "paint white", "keep, paint green", "keep, paint white"]
WHOLE = {
    "": lambda image: image,
    "mirror": lambda image: image[:, ::-1],
    "upside down": lambda image: image[::-1],
    "turn": lambda image: np.rot90(image),
    "negative": lambda image: 1 - image,
    "grey": lambda image: image.mean(-1, keepdims=True).repeat(3, -1),
}
EDITS = [Edit(*parts) for parts in product(WHICH, HOW, WHOLE)]
EDITS = [edit for edit in EDITS if not (edit.which == "green" and "green" in edit.how)]
random.Random(0).shuffle(EDITS)
TEST, VAL, TRAIN = EDITS[:25], EDITS[25:33], EDITS[33:]  # 564 edits
PHRASES = read_json(Path(__file__).parent / "phrases.json")

GRID = range(0, SIZE - OBJECT + 1, PATCH)
PLACES = []  # of three objects that do not overlap: their upper left corners
for places in combinations(product(GRID, GRID), 3):
    if all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= OBJECT for a, b in combinations(places, 2)):
        PLACES.append(places)


def means(edit: Edit, thing: Object) -> bool:
    return edit.which in (thing.shape, thing.colour)


def draw_scene(edit: Edit, rng: random.Random) -> Scene:
    """A random scene of three objects in which the edit means some, but not all."""
    while True:
        shapes, colours = rng.sample(list(SHAPES), 2), rng.sample(list(COLOURS)[:6], 2)
        if edit.which in SHAPES:
            shapes[0] = edit.which
        else:
            colours[0] = edit.which
        objects = []
        for row, column in rng.choice(PLACES):
            objects.append(Object(rng.choice(shapes), rng.choice(colours), row, column))
        if sum(means(edit, thing) for thing in objects) in (1, 2):
            return Scene(rng.choice(BACKGROUNDS), objects)


def render(scene: Scene) -> np.ndarray:
    """The picture, from 0 to 1. [24, 24, 3]"""
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = scene.background
    for shape, colour, row, column in scene.objects:
        image[row : row + OBJECT, column : column + OBJECT][SHAPES[shape]] = COLOURS[colour]
    return image


def apply(edit: Edit, scene: Scene) -> np.ndarray:
    """The edited picture. [24, 24, 3]"""
    objects = []
    for thing in scene.objects:
        meant = means(edit, thing)
        if meant and "paint" in edit.how:
            thing = thing._replace(colour=edit.how.split()[-1])
        if (meant and edit.how != "remove") or (not meant and "keep" not in edit.how):
            objects.append(thing)
    return WHOLE[edit.whole](render(Scene(scene.background, objects)))


def describe(edit: Edit, rng: random.Random, withheld: bool = False) -> str:
    """A description, in wordings of training or in those that training never uses."""

    def say(part: str, **words) -> str:
        return rng.choice(PHRASES[f"{part}_withheld" if withheld else part]).format(**words)

    plural = edit.which + ("es" if edit.which.endswith("s") else "s")
    meant = say("shape" if edit.which in SHAPES else "colour", x=edit.which, xs=plural)
    colour = edit.how.split()[-1]
    if edit.how == "remove":
        how = say("remove", x=meant)
    elif "keep" not in edit.how:
        how = say("paint", x=meant, c=colour)
    else:
        how = say("keep", x=meant)
        if "paint" in edit.how:
            how += rng.choice([" and ", ", "]) + say("paint", x=rng.choice(["it", "them"]), c=colour)
    whole = say(edit.whole) if edit.whole else ""
    text = rng.choice(PHRASES["frames" if whole else "frames_one"]).format(how=how, whole=whole)
    return text[0].upper() + text[1:]
