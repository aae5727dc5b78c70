"""Draws endless small scenes with captions that say what is in them, and tells whether a caption is right."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw

PICTURE_SIZE = 256
MOST_OF_A_KIND = 4
MOST_IN_A_SCENE = 6

Rgb = tuple[int, int, int]
Frame = tuple[float, float, float, float]  # left, top, right, bottom

COLOURS: dict[str, Rgb] = {
    "red": (216, 44, 48),
    "orange": (247, 136, 22),
    "yellow": (252, 216, 44),
    "green": (22, 132, 66),
    "blue": (34, 88, 214),
    "purple": (136, 58, 184),
    "white": (250, 250, 248),
    "black": (42, 42, 50),
}

WEATHER_WORDS: dict[str, tuple[str, ...]] = {
    "sunny": ("on a sunny day", "under a bright sun"),
    "cloudy": ("on a cloudy day", "under a cloudy sky"),
    "rain": ("in the rain", "on a rainy day"),
    "snow": ("in the snow", "on a snowy day"),
    "night": ("at night", "under the moon"),
}

# Each relation is kept one way round (left of, above, in front of); the second line says it from the other side.
RELATION_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "left": (("to the left of", "left of"), ("to the right of", "right of")),
    "above": (("above", "high above"), ("below", "far below")),
    "front": (("in front of",), ("behind",)),
}
WITH_WORDS: dict[str, tuple[str, str]] = {
    "left": ("to the left", "to the right"),
    "above": ("above", "below"),
    "front": ("in front", "behind"),
}

SIDE_WORDS = ("on the left", "on the right")

NUMBERS = ("a", "two", "three", "four")


@dataclass(frozen=True, slots=True)
class Kind:
    """A thing that can be drawn: its words, the part of the scene it lives in, and usual size (the picture is 1)."""

    one: str
    many: str
    realm: str
    width: float
    height: float


KINDS: dict[str, Kind] = {
    kind.one: kind
    for kind in (
        Kind("house", "houses", "ground", 0.30, 0.31),
        Kind("tree", "trees", "ground", 0.23, 0.34),
        Kind("tent", "tents", "ground", 0.28, 0.21),
        Kind("car", "cars", "ground", 0.28, 0.15),
        Kind("person", "people", "ground", 0.13, 0.27),
        Kind("cat", "cats", "ground", 0.19, 0.18),
        Kind("ball", "balls", "ground", 0.14, 0.14),
        Kind("boat", "boats", "water", 0.27, 0.28),
        Kind("duck", "ducks", "water", 0.20, 0.17),
        Kind("balloon", "balloons", "sky", 0.20, 0.27),
        Kind("bird", "birds", "sky", 0.22, 0.18),
        Kind("kite", "kites", "sky", 0.16, 0.25),
    )
}

# What may stand before what, so that the one in front never hides the one behind.
BEFORE_AND_BEHIND = (
    (("car", "person", "cat", "ball"), ("house", "tree", "tent")),
    (("duck",), ("boat",)),
)


@dataclass(frozen=True, slots=True)
class Group:
    """So many things of one kind and colour."""

    kind: str
    colour: str
    count: int


@dataclass(frozen=True, slots=True)
class Scene:
    """What is true of a picture: `first` is `relation` ("left", "above", "front") of `second`.

    `key` seeds everything that the truth leaves open: where things stand, the hills, the clouds, the wording.
    """

    key: str
    first: Group
    relation: str
    second: Group
    weather: str

    @property
    def on_water(self) -> bool:
        return "water" in (KINDS[self.first.kind].realm, KINDS[self.second.kind].realm)


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing of a scene and where it is; the picture is 1 wide and 1 high."""

    kind: str
    colour: str
    frame: Frame


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a caption gets right; `weather` is right too where the caption does not mention it."""

    object: bool
    colour: bool
    count: bool
    relation: bool
    weather: bool

    @property
    def right(self) -> bool:
        return self.object and self.colour and self.count and self.relation and self.weather


# Making up a scene


def make_scene(seed: int, index: int, relations: Sequence[str] = ("left", "left", "above", "front")) -> Scene:
    """The scene of that number in the endless row that `seed` begins; the same on every machine."""
    key = f"{seed}-{index}"
    rng = random.Random(key)
    relation = rng.choice(relations)
    kinds = _choose_kinds(rng, relation)
    colours = _choose_colours(rng, kinds)
    most = 3 if relation == "front" else MOST_OF_A_KIND
    counts = rng.choice([(a, b) for a in range(1, most + 1) for b in range(1, most + 1) if a + b <= MOST_IN_A_SCENE])
    first, second = (Group(*facts) for facts in zip(kinds, colours, counts, strict=True))
    return Scene(key, first, relation, second, rng.choice(tuple(WEATHER_WORDS)))


def _choose_kinds(rng: random.Random, relation: str) -> tuple[str, str]:
    if relation == "front":
        before, behind = rng.choices(BEFORE_AND_BEHIND, weights=(5, 1))[0]
        return rng.choice(before), rng.choice(behind)
    if relation == "above":
        return rng.choice(_of_realm("sky")), rng.choice(_of_realm("ground") + _of_realm("water"))
    realm = rng.choices(("ground", "water", "sky"), weights=(5, 2, 3))[0]
    return rng.choice(_of_realm(realm)), rng.choice(_of_realm(realm))


def _of_realm(realm: str) -> list[str]:
    return [name for name, kind in KINDS.items() if kind.realm == realm]


def _choose_colours(rng: random.Random, kinds: tuple[str, str]) -> tuple[str, str]:
    """Two groups of one kind must differ in colour: otherwise they would be one group."""
    first = rng.choice(tuple(COLOURS))
    return first, rng.choice([colour for colour in COLOURS if kinds[0] != kinds[1] or colour != first])


# Where things stand


def place(scene: Scene) -> list[Thing]:
    """Every thing of the scene with its place, those at the back first."""
    rng = random.Random(f"{scene.key} places")
    regions = {"left": _side_by_side, "above": _one_over_the_other, "front": _one_before_the_other}[scene.relation]
    things = []
    for group, region in zip((scene.first, scene.second), regions(rng, scene), strict=True):
        things += _spread(rng, group, region)
    return sorted(things, key=lambda thing: thing.frame[3])


def _side_by_side(rng: random.Random, scene: Scene) -> tuple[Frame, Frame]:
    split = 0.5 + 0.035 * (scene.first.count - scene.second.count) + rng.uniform(-0.03, 0.03)
    top, bottom = {"ground": (0.42, 0.95), "water": (0.42, 0.95), "sky": (0.05, 0.60)}[KINDS[scene.first.kind].realm]
    return (0.03, top, split - 0.035, bottom), (split + 0.035, top, 0.97, bottom)


def _one_over_the_other(rng: random.Random, scene: Scene) -> tuple[Frame, Frame]:
    centre = rng.uniform(0.4, 0.6)
    upper = _window(centre, 0.30 + 0.14 * scene.first.count)
    lower = _window(centre + rng.uniform(-0.08, 0.08), 0.34 + 0.14 * scene.second.count)
    return (upper[0], 0.04, upper[1], 0.46), (lower[0], 0.50, lower[1], 0.96)


def _one_before_the_other(rng: random.Random, scene: Scene) -> tuple[Frame, Frame]:
    centre = rng.uniform(0.42, 0.58)
    before = _window(centre + rng.uniform(-0.04, 0.04), 0.26 + 0.16 * scene.first.count)
    behind = _window(centre, 0.36 + 0.18 * scene.second.count)
    return (before[0], 0.66, before[1], 0.97), (behind[0], 0.32, behind[1], 0.72)


def _window(centre: float, width: float) -> tuple[float, float]:
    """A stretch of that width within the picture, as near to `centre` as it goes."""
    width = min(width, 0.94)
    left = min(max(centre - width / 2, 0.03), 0.97 - width)
    return left, left + width


ROWS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,),),
    2: ((2,), (1, 1)),
    3: ((3,), (1, 2), (2, 1)),
    4: ((4,), (2, 2), (1, 3), (3, 1)),
}


def _spread(rng: random.Random, group: Group, region: Frame) -> list[Thing]:
    """The group's things in rows over the region, each in a cell of its own, so that none hides another."""
    kind = KINDS[group.kind]
    choices = [(rows, _scale(kind, rows, region)) for rows in ROWS[group.count]]
    largest = max(scale for _, scale in choices)
    rows, scale = rng.choice([choice for choice in choices if choice[1] >= 0.8 * largest])
    left, top, right, bottom = region
    row_height = (bottom - top) / len(rows)
    if len(rows) == 1:  # a single row need not stand at the very bottom
        bottom -= rng.uniform(0, 0.5) * max(0.0, row_height - kind.height * scale)
    things = []
    for number, in_row in enumerate(reversed(rows)):
        cell_width = (right - left) / in_row
        for column in range(in_row):
            size = scale * rng.uniform(0.88, 1.0)
            width, height = kind.width * size, kind.height * size
            x = left + column * cell_width + rng.uniform(0.1, 0.9) * (cell_width - width)
            y = bottom - number * row_height - rng.uniform(0, 0.35) * max(0.0, row_height - height)
            things.append(Thing(group.kind, group.colour, (x, y - height, x + width, y)))
    return things


def _scale(kind: Kind, rows: tuple[int, ...], region: Frame) -> float:
    left, top, right, bottom = region
    cell_width, cell_height = (right - left) / max(rows), (bottom - top) / len(rows)
    return min(1.2, 0.92 * cell_width / kind.width, 0.94 * cell_height / kind.height)


# Saying what is there, and reading it back


def captions(scene: Scene, count: int = 5) -> tuple[str, ...]:
    """Several ways to say the scene, no two the same; each states objects, colours, counts and the relation."""
    return _different(partial(_phrase, random.Random(f"{scene.key} words"), scene), count)


def side_captions(scene: Scene, group: Group, count: int = 3) -> tuple[str, ...]:
    """Several ways to say one group of a scene whose groups stand side by side, and the side it stands on."""
    return _different(partial(_side_phrase, random.Random(f"{scene.key} words"), scene, group), count)


def _different(say: Callable[[], str], count: int) -> tuple[str, ...]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[say()] = None
    return tuple(found)


def _side_phrase(rng: random.Random, scene: Scene, group: Group) -> str:
    text = f"{describe(rng, group)} {SIDE_WORDS[group == scene.second]}"
    return rng.choice((text, f"{text} {rng.choice(WEATHER_WORDS[scene.weather])}"))


def _phrase(rng: random.Random, scene: Scene) -> str:
    first, second = describe(rng, scene.first), describe(rng, scene.second)
    forward, backward = RELATION_WORDS[scene.relation]
    here, there = WITH_WORDS[scene.relation]
    text = rng.choice(
        (
            f"{first} {rng.choice(forward)} {second}",
            f"{first} {forward[0]} {second}",
            f"{second} {rng.choice(backward)} {first}",
            f"{second} with {first} {here}",
            f"{first} with {second} {there}",
        )
    )
    weather = rng.choice(WEATHER_WORDS[scene.weather])
    return rng.choice((text, f"{text} {weather}", f"{text} {weather}", f"{text} {weather}", f"{weather}, {text}"))


def describe(rng: random.Random, group: Group) -> str:
    """The group in words: "two red balls", "a person in blue", "three people in white coats"."""
    kind = KINDS[group.kind]
    number = NUMBERS[group.count - 1]
    if group.kind == "person":  # the colour is that of the coat, never of the person
        noun = kind.one if group.count == 1 else kind.many
        coat = f"{_article(group.colour)} {group.colour} coat" if group.count == 1 else f"{group.colour} coats"
        return f"{number} {noun} in {rng.choice((group.colour, coat))}"
    if group.count == 1:
        return f"{_article(group.colour)} {group.colour} {kind.one}"
    return f"{number} {group.colour} {kind.many}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a caption says, turned the way a scene keeps it; `weather` is None where it is not mentioned."""

    first: Group
    relation: str
    second: Group
    weather: str | None


def read(caption: str) -> Reading | None:
    """What the caption says; None where it is not wholly one of the sentences that `captions` writes."""
    text, weather = _take_weather(caption)
    for relation, (forward, backward) in RELATION_WORDS.items():
        here, there = WITH_WORDS[relation]
        sentences = [(rf"(.+) {words} (.+)", True) for words in forward]
        sentences += [(rf"(.+) {words} (.+)", False) for words in backward]
        sentences += [(rf"(.+) with (.+) {here}", False), (rf"(.+) with (.+) {there}", True)]
        for pattern, first_comes_first in sentences:
            match = re.fullmatch(pattern, text)
            groups = [_read_group(words) for words in match.groups()] if match else []
            if groups and groups[0] and groups[1]:
                one, other = groups if first_comes_first else reversed(groups)
                return Reading(one, relation, other, weather)
    return None


def _take_weather(caption: str) -> tuple[str, str | None]:
    for weather, phrases in WEATHER_WORDS.items():
        for phrase in phrases:
            if caption.startswith(f"{phrase}, "):
                return caption.removeprefix(f"{phrase}, "), weather
            if caption.endswith(f" {phrase}"):
                return caption.removesuffix(f" {phrase}"), weather
    return caption, None


def _all_group_words() -> dict[str, Group]:
    groups = [Group(k, c, n) for k in KINDS for c in COLOURS for n in range(1, MOST_OF_A_KIND + 1)]
    return {describe(random.Random(seed), group): group for group in groups for seed in range(8)}


GROUP_WORDS = _all_group_words()


def _read_group(words: str) -> Group | None:
    return GROUP_WORDS.get(words)


def judge(caption: str, scene: Scene) -> Verdict:
    """Which of its statements are true of the scene; a caption that cannot be read is wrong in all.

    The two groups may come in either order as long as the relation fits. Where the caption is partly wrong, its groups
    are matched with the scene's in the way that leaves the most right.
    """
    said = read(caption)
    if said is None:
        return Verdict(False, False, False, False, False)
    weather = said.weather in (None, scene.weather)
    straight = _compare((said.first, said.second), scene, said.relation == scene.relation, weather)
    crossed = _compare((said.second, said.first), scene, False, weather)
    return max(straight, crossed, key=lambda v: (v.object + v.colour + v.count + v.relation, v.object))


def _compare(said: tuple[Group, Group], scene: Scene, relation: bool, weather: bool) -> Verdict:
    pairs = tuple(zip(said, (scene.first, scene.second), strict=True))
    return Verdict(
        object=all(a.kind == b.kind for a, b in pairs),
        colour=all(a.colour == b.colour for a, b in pairs),
        count=all(a.count == b.count for a, b in pairs),
        relation=relation,
        weather=weather,
    )


# Drawing


@dataclass(frozen=True, slots=True)
class Pen:
    """Draws in the frame of one thing: 0 to 1 across it, 0 to 1 down it."""

    canvas: ImageDraw.ImageDraw
    left: float
    top: float
    width: float
    height: float
    edge: Rgb
    line: int
    mirrored: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.left + (1 - x if self.mirrored else x) * self.width, self.top + y * self.height

    def frame(self, x0: float, y0: float, x1: float, y1: float) -> Frame:
        return (*self.at(x1 if self.mirrored else x0, y0), *self.at(x0 if self.mirrored else x1, y1))

    def oval(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb, edged: bool = True) -> None:
        self.canvas.ellipse(self.frame(x0, y0, x1, y1), fill, self.edge if edged else None, self.line)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb, round_by: float = 0.0) -> None:
        radius = round_by * min(self.width, self.height)
        self.canvas.rounded_rectangle(self.frame(x0, y0, x1, y1), radius, fill, self.edge, self.line)

    def shape(self, points: Sequence[tuple[float, float]], fill: Rgb) -> None:
        placed = [self.at(x, y) for x, y in points]
        self.canvas.polygon(placed, fill)
        self.canvas.line([*placed, placed[0]], self.edge, self.line, joint="curve")

    def stroke(self, points: Sequence[tuple[float, float]], fill: Rgb, thick: float = 1.0) -> None:
        self.canvas.line([self.at(x, y) for x, y in points], fill, max(1, round(self.line * thick)), joint="curve")


def mix(one: Rgb, other: Rgb, share: float) -> Rgb:
    """`share` of the other colour in the one."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


WHITE, DARK, WOOD, GLASS, BEAK = (255, 255, 255), (38, 40, 54), (122, 84, 56), (214, 236, 246), (246, 160, 40)
PETALS = ((255, 250, 240), (250, 222, 120), (244, 176, 196))
SKINS = ((250, 218, 190), (226, 176, 136), (172, 118, 82), (112, 74, 52))


def _eye(paint: Rgb) -> Rgb:
    return DARK if sum(paint) > 160 else WHITE


def _draw_house(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    pen.box(0.70, 0.04, 0.80, 0.36, (150, 110, 98))
    pen.box(0.10, 0.42, 0.90, 1.0, paint)
    pen.shape([(0.0, 0.46), (0.5, 0.0), (1.0, 0.46)], mix(paint, DARK, 0.42))
    pen.box(0.42, 0.66, 0.60, 1.0, WOOD)
    light = rng.choice((GLASS, (255, 236, 160)))
    pen.box(0.18, 0.56, 0.34, 0.76, light)
    pen.box(0.68, 0.56, 0.84, 0.76, light)


def _draw_tree(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    pen.box(0.42, 0.60, 0.58, 1.0, WOOD)
    if rng.random() < 0.5:
        for top, half in ((0.36, 0.46), (0.18, 0.38), (0.0, 0.28)):
            pen.shape([(0.5 - half, top + 0.40), (0.5, top), (0.5 + half, top + 0.40)], paint)
        return
    for x, y in ((0.0, 0.26), (0.42, 0.26), (0.2, 0.0)):
        pen.oval(x, y, x + 0.58, y + 0.46, paint)
    pen.oval(0.14, 0.12, 0.86, 0.66, paint, edged=False)
    pen.oval(0.32, 0.10, 0.50, 0.22, mix(paint, WHITE, 0.3), edged=False)


def _draw_tent(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    lean = rng.uniform(0.46, 0.54)
    pen.stroke([(lean - 0.05, 0.0), (lean, 0.10), (lean + 0.05, 0.0)], WOOD, 1.5)
    pen.shape([(0.0, 1.0), (lean, 0.08), (1.0, 1.0)], paint)
    pen.shape([(0.34, 1.0), (lean, 0.30), (0.66, 1.0)], mix(paint, DARK, 0.6))
    pen.shape([(0.66, 1.0), (lean, 0.30), (0.76, 1.0)], mix(paint, WHITE, 0.4))


def _draw_car(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    pen.shape([(0.18, 0.48), (0.32, 0.04), (0.68, 0.04), (0.84, 0.48)], paint)
    pen.shape([(0.27, 0.44), (0.36, 0.14), (0.48, 0.14), (0.48, 0.44)], GLASS)
    pen.shape([(0.53, 0.44), (0.53, 0.14), (0.65, 0.14), (0.74, 0.44)], GLASS)
    pen.box(0.0, 0.42, 1.0, 0.84, paint, 0.16)
    lamp = 0.92 if rng.random() < 0.5 else 0.0
    pen.oval(lamp, 0.50, lamp + 0.08, 0.66, (255, 240, 170))
    for x in (0.14, 0.64):
        pen.oval(x, 0.60, x + 0.22, 1.0, DARK)
        pen.oval(x + 0.07, 0.73, x + 0.15, 0.87, (200, 200, 206), edged=False)


def _draw_person(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    skin = rng.choice(SKINS)
    for x in (0.30, 0.54):
        pen.box(x, 0.74, x + 0.16, 1.0, (70, 74, 104))
    pen.shape([(0.26, 0.36), (0.02, 0.62), (0.16, 0.70), (0.36, 0.48)], paint)
    pen.shape([(0.74, 0.36), (0.98, 0.62), (0.84, 0.70), (0.64, 0.48)], paint)
    pen.shape([(0.28, 0.33), (0.72, 0.33), (0.84, 0.82), (0.16, 0.82)], paint)
    pen.oval(0.24, 0.0, 0.76, 0.32, rng.choice(((70, 48, 36), (40, 36, 40), (196, 150, 84))))
    pen.oval(0.28, 0.06, 0.72, 0.33, skin, edged=False)
    for x in (0.38, 0.56):
        pen.oval(x, 0.16, x + 0.07, 0.20, DARK, edged=False)


def _draw_cat(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    pen.stroke([(0.84, 0.80), (0.97, 0.58), (0.92, 0.32)], pen.edge, 5.0)
    pen.stroke([(0.84, 0.80), (0.97, 0.58), (0.92, 0.32)], paint, 3.4)
    pen.oval(0.30, 0.42, 0.90, 1.0, paint)
    for x in (0.04, 0.38):
        pen.shape([(x, 0.30), (x + 0.06, 0.0), (x + 0.22, 0.16)], paint)
    pen.oval(0.0, 0.10, 0.62, 0.68, paint)
    pale = mix(paint, WHITE, 0.85) if sum(paint) < 600 else DARK
    shut = rng.random() < 0.2
    for x in (0.14, 0.38):
        pen.oval(x, 0.34 if not shut else 0.39, x + 0.11, 0.46 if not shut else 0.43, pale, edged=False)
    pen.shape([(0.27, 0.50), (0.35, 0.50), (0.31, 0.56)], (240, 150, 160))


def _draw_ball(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    pen.oval(0.0, 0.0, 1.0, 1.0, paint)
    y = rng.uniform(0.48, 0.6)
    pen.stroke([(0.06, y - 0.06), (0.5, y + 0.06), (0.94, y - 0.06)], mix(paint, WHITE, 0.7), 2.0)
    pen.oval(0.22, 0.14, 0.44, 0.32, mix(paint, WHITE, 0.75), edged=False)


def _draw_boat(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    pen.stroke([(0.48, 0.0), (0.48, 0.72)], WOOD, 2.0)
    low = rng.uniform(0.60, 0.66)
    pen.shape([(0.53, 0.04), (0.96, low), (0.53, low)], mix(paint, WHITE, 0.25))
    pen.shape([(0.43, 0.14), (0.43, low), (0.10, low)], mix(paint, WHITE, 0.5))
    pen.shape([(0.0, 0.70), (1.0, 0.70), (0.82, 1.0), (0.18, 1.0)], paint)


def _draw_duck(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    tail = rng.uniform(0.42, 0.50)
    pen.shape([(0.0, tail), (0.24, 0.62), (0.14, 0.84)], paint)
    pen.oval(0.06, 0.44, 0.80, 1.0, paint)
    pen.shape([(0.84, 0.20), (1.0, 0.27), (0.84, 0.34)], BEAK)
    pen.oval(0.48, 0.0, 0.88, 0.52, paint)
    pen.oval(0.24, 0.56, 0.58, 0.84, mix(paint, DARK if sum(paint) > 300 else WHITE, 0.25))
    pen.oval(0.68, 0.15, 0.75, 0.24, _eye(paint), edged=False)


def _draw_balloon(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    for x in (0.30, 0.70):
        pen.stroke([(x, 0.60), (0.5 + (x - 0.5) * 0.5, 0.88)], WOOD)
    pen.shape([(0.10, 0.50), (0.90, 0.50), (0.62, 0.76), (0.38, 0.76)], paint)
    pen.oval(0.0, 0.0, 1.0, 0.68, paint)
    inner = rng.uniform(0.30, 0.36)
    pen.oval(inner, 0.0, 1 - inner, 0.68, mix(paint, WHITE if sum(paint) < 700 else DARK, 0.22))
    pen.box(0.37, 0.86, 0.63, 1.0, WOOD)


def _draw_bird(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    tip = rng.uniform(0.0, 0.10)
    pen.shape([(0.50, 0.50), (0.60, tip), (0.34, 0.48)], mix(paint, DARK if sum(paint) > 160 else WHITE, 0.25))
    pen.shape([(0.30, 0.62), (0.0, 0.54), (0.02, 0.72), (0.12, 0.84)], paint)
    pen.shape([(0.88, 0.50), (1.0, 0.58), (0.88, 0.66)], BEAK)
    pen.oval(0.18, 0.42, 0.80, 0.94, paint)
    pen.oval(0.62, 0.34, 0.92, 0.76, paint)
    pen.shape([(0.58, 0.64), (0.24, tip), (0.22, 0.40), (0.34, 0.66)], paint)
    pen.oval(0.76, 0.46, 0.83, 0.56, _eye(paint), edged=False)


def _draw_kite(pen: Pen, paint: Rgb, rng: random.Random) -> None:
    sway = rng.choice((-1, 1)) * rng.uniform(0.10, 0.22)
    tail = [(0.5, 0.58), (0.5 + sway, 0.70), (0.5 - sway, 0.84), (0.5 + sway, 1.0)]
    pen.stroke(tail, pen.edge)
    for x, y in tail[1:]:
        pen.shape([(x - 0.12, y - 0.04), (x + 0.12, y + 0.02), (x + 0.12, y - 0.04), (x - 0.12, y + 0.02)], paint)
    pen.shape([(0.5, 0.0), (1.0, 0.24), (0.5, 0.60), (0.0, 0.24)], paint)
    pen.shape([(0.5, 0.0), (1.0, 0.24), (0.5, 0.24)], mix(paint, WHITE if sum(paint) < 700 else DARK, 0.25))
    pen.shape([(0.0, 0.24), (0.5, 0.60), (0.5, 0.24)], mix(paint, WHITE if sum(paint) < 700 else DARK, 0.25))


DRAWERS: dict[str, Callable[[Pen, Rgb, random.Random], None]] = {
    "house": _draw_house,
    "tree": _draw_tree,
    "tent": _draw_tent,
    "car": _draw_car,
    "person": _draw_person,
    "cat": _draw_cat,
    "ball": _draw_ball,
    "boat": _draw_boat,
    "duck": _draw_duck,
    "balloon": _draw_balloon,
    "bird": _draw_bird,
    "kite": _draw_kite,
}


@dataclass(frozen=True, slots=True)
class Light:
    """The colours of a backdrop in one kind of weather."""

    zenith: Rgb
    horizon: Rgb
    hill: Rgb
    grass: Rgb
    water: Rgb
    cloud: Rgb


LIGHTS: dict[str, Light] = {
    "sunny": Light(
        (116, 190, 240), (222, 242, 252), (150, 204, 160), (164, 214, 116), (112, 196, 222), (255, 255, 255)
    ),
    "cloudy": Light(
        (168, 186, 204), (226, 230, 234), (150, 178, 158), (152, 190, 120), (130, 174, 192), (244, 246, 248)
    ),
    "rain": Light((122, 138, 160), (190, 200, 210), (122, 150, 138), (128, 168, 108), (112, 146, 166), (164, 174, 188)),
    "snow": Light((184, 204, 224), (232, 238, 246), (206, 216, 228), (228, 236, 244), (158, 192, 212), (244, 246, 250)),
    "night": Light((52, 62, 116), (124, 124, 176), (76, 92, 118), (94, 128, 106), (84, 108, 154), (112, 118, 160)),
}


def draw(scene: Scene, size: int = PICTURE_SIZE, *, without: Group | None = None) -> Image.Image:
    """The scene as an RGB picture of size x size; a group that it is drawn without leaves its place empty."""
    rng = random.Random(f"{scene.key} strokes")
    side = 2 * size  # drawn at twice the size and halved: Pillow's own edges are jagged
    light = LIGHTS[scene.weather]
    horizon = rng.uniform(0.50, 0.55) if not scene.on_water else rng.uniform(0.44, 0.49)
    picture = _sky(light, side, horizon)
    canvas = ImageDraw.Draw(picture)
    _draw_heavens(canvas, rng, scene.weather, side)
    _draw_land(canvas, rng, scene, light, side, horizon)
    for thing in place(scene):
        if without is None or (thing.kind, thing.colour) != (without.kind, without.colour):
            _draw_thing(canvas, rng, thing, light, side)
    _draw_weather(canvas, rng, scene.weather, side)
    return picture.reduce(2)


def _sky(light: Light, side: int, horizon: float) -> Image.Image:
    column = Image.new("RGB", (1, 32))
    column.putdata([mix(light.zenith, light.horizon, min(1.0, y / 31 / horizon)) for y in range(32)])
    return column.resize((side, side), Image.Resampling.BILINEAR)


def _draw_heavens(canvas: ImageDraw.ImageDraw, rng: random.Random, weather: str, side: int) -> None:
    light = LIGHTS[weather]
    x, y, radius = rng.choice((rng.uniform(0.08, 0.25), rng.uniform(0.75, 0.92))), rng.uniform(0.08, 0.16), 0.065
    if weather == "night":
        for _ in range(26):
            _dot(canvas, side, rng.random(), rng.uniform(0, 0.45), rng.uniform(0.002, 0.005), (240, 238, 214))
        _dot(canvas, side, x, y, radius * 1.5, mix(light.zenith, WHITE, 0.12))
        _dot(canvas, side, x, y, radius, (252, 246, 214))
        _dot(canvas, side, x + radius * 0.5, y - radius * 0.25, radius * 0.85, mix(light.zenith, WHITE, 0.12))
    if weather == "sunny":
        _dot(canvas, side, x, y, radius * 1.9, mix(light.zenith, (255, 244, 190), 0.35))
        _dot(canvas, side, x, y, radius * 1.4, mix(light.zenith, (255, 240, 170), 0.65))
        _dot(canvas, side, x, y, radius, (255, 226, 96))
    for _ in range({"sunny": 2, "cloudy": 7, "rain": 6, "snow": 4, "night": 1}[weather]):
        _cloud(canvas, side, rng, light.cloud)


def _dot(canvas: ImageDraw.ImageDraw, side: int, x: float, y: float, radius: float, fill: Rgb) -> None:
    canvas.ellipse([(part - sign * radius) * side for sign in (1, -1) for part in (x, y)], fill)


def _cloud(canvas: ImageDraw.ImageDraw, side: int, rng: random.Random, fill: Rgb) -> None:
    x, y, size = rng.uniform(0.0, 1.0), rng.uniform(0.04, 0.34), rng.uniform(0.03, 0.055)
    for dx, dy, share in ((-1.3, 0.25, 0.7), (1.3, 0.25, 0.75), (-0.45, -0.15, 0.95), (0.55, -0.05, 0.9)):
        _dot(canvas, side, x + dx * size, y + dy * size, share * size, fill)
    left, right = (x - 1.3 * size) * side, (x + 1.3 * size) * side
    canvas.rectangle((left, (y + 0.1 * size) * side, right, (y + 0.95 * size) * side), fill)


def _draw_land(
    canvas: ImageDraw.ImageDraw, rng: random.Random, scene: Scene, light: Light, side: int, horizon: float
) -> None:
    for share in (0.35, 0.0):  # the farther hills fade into the air
        _hills(canvas, rng, side, horizon, mix(light.hill, light.horizon, share), 0.10 if share else 0.05)
    top = horizon * side
    canvas.rectangle((0, top, side, side), light.water if scene.on_water else light.grass)
    bands = 5
    for band in range(1, bands):  # nearer ground is a little deeper in colour
        shade = mix(light.water if scene.on_water else light.grass, DARK, 0.028 * band)
        canvas.rectangle((0, top + (side - top) * (band / bands) ** 1.4, side, side), shade)
    for _ in range(26):
        _draw_texture(canvas, rng, scene, light, side, horizon)


def _hills(
    canvas: ImageDraw.ImageDraw, rng: random.Random, side: int, horizon: float, fill: Rgb, height: float
) -> None:
    x = rng.uniform(-0.3, 0.0)
    while x < 1.0:
        width, rise = rng.uniform(0.4, 0.8), rng.uniform(0.5, 1.0) * height
        frame = (x * side, (horizon - rise) * side, (x + width) * side, (horizon + rise) * side)
        canvas.ellipse(frame, fill)
        x += width * rng.uniform(0.4, 0.75)


def _draw_texture(
    canvas: ImageDraw.ImageDraw, rng: random.Random, scene: Scene, light: Light, side: int, horizon: float
) -> None:
    x, depth = rng.random(), rng.random()
    y, size = horizon + 0.02 + (0.96 - horizon) * depth, 0.008 + 0.014 * depth
    if scene.on_water:
        wave = (x * side, y * side, (x + 4 * size) * side, (y + size) * side)
        canvas.arc(wave, 20, 160, mix(light.water, WHITE, 0.35), max(1, side // 200))
    elif scene.weather != "snow":
        if rng.random() < 0.3:
            _dot(canvas, side, x, y - 1.3 * size, 0.32 * size, rng.choice(PETALS))
        for lean in (-0.5, 0.0, 0.5):
            blade = (x * side, y * side, (x + lean * size) * side, (y - size) * side)
            canvas.line(blade, mix(light.grass, (50, 110, 50), 0.3), max(1, side // 256))
    else:
        drift = (x * side, y * side, (x + 5 * size) * side, (y + size) * side)
        canvas.arc(drift, 200, 340, (204, 216, 230), max(1, side // 256))


def _draw_thing(canvas: ImageDraw.ImageDraw, rng: random.Random, thing: Thing, light: Light, side: int) -> None:
    left, top, right, bottom = (part * side for part in thing.frame)
    paint = COLOURS[thing.colour]
    edge = mix(paint, DARK, 0.55) if thing.colour != "black" else (104, 106, 122)
    realm = KINDS[thing.kind].realm
    if realm != "sky":
        flat = 0.018 * side
        shade = mix(light.grass, DARK, 0.3) if realm == "ground" else mix(light.water, WHITE, 0.4)
        canvas.ellipse((left, bottom - flat, right + flat, bottom + flat), shade)
    pen = Pen(canvas, left, top, right - left, bottom - top, edge, max(1, side // 220), rng.random() < 0.5)
    DRAWERS[thing.kind](pen, paint, rng)


def _draw_weather(canvas: ImageDraw.ImageDraw, rng: random.Random, weather: str, side: int) -> None:
    if weather == "rain":
        for _ in range(46):
            x, y, length = rng.random(), rng.random(), rng.uniform(0.03, 0.06)
            drop = (x * side, y * side, (x - 0.3 * length) * side, (y + length) * side)
            canvas.line(drop, (206, 222, 240), max(1, side // 256))
    if weather == "snow":
        for _ in range(60):
            _dot(canvas, side, rng.random(), rng.random(), rng.uniform(0.003, 0.008), WHITE)


# A folder of scenes


def write_folder(
    folder: Path, count: int, seed: int, suffixes: Sequence[str] = (".jpg",), *, sides: bool = False
) -> None:
    """Draws `count` scenes into the folder, with a `metadata.jsonl` beside them (Hugging Face's imagefolder).

    Its rows hold `file_name`, `text` (one caption) and `captions` (all of them). The suffixes take turns.
    `sides` draws one group of each scene only, on its side of the picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"scene-{index:04d}{suffixes[index % len(suffixes)]}" for index in range(count)]
    write = partial(write_side if sides else write_scene, folder, seed)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8", newline="\n") as rows, ProcessPoolExecutor() as workers:
        for name, said in zip(names, workers.map(write, range(count), names, chunksize=100), strict=True):
            rows.write(json.dumps({"file_name": name, "text": said[0], "captions": list(said)}) + "\n")


def write_scene(folder: Path, seed: int, index: int, name: str) -> tuple[str, ...]:
    """Draws one scene into the folder; its captions."""
    scene = make_scene(seed, index)
    _save(draw(scene), folder / name)
    return captions(scene)


def write_side(folder: Path, seed: int, index: int, name: str) -> tuple[str, ...]:
    """Draws one side of a scene whose groups stand side by side into the folder; its captions."""
    scene = make_scene(seed, index, ("left",))
    drawn, without = (scene.first, scene.second) if index % 2 else (scene.second, scene.first)
    _save(draw(scene, without=without), folder / name)
    return side_captions(scene, drawn)


def write_classes(folder: Path, count: int, seed: int, suffixes: Sequence[str] = (".jpg",)) -> None:
    """Draws one group of each of `count` scenes into the folder of its kind: cat/scene-0001.jpg and the like."""
    scenes = [make_scene(seed, index, ("left",)) for index in range(count)]
    kinds = [(scene.first if index % 2 else scene.second).kind for index, scene in enumerate(scenes)]
    for kind in sorted(set(kinds)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    names = [f"{kind}/scene-{n:04d}{suffixes[n % len(suffixes)]}" for n, kind in enumerate(kinds)]
    with ProcessPoolExecutor() as workers:
        list(workers.map(partial(write_side, folder, seed), range(count), names, chunksize=100))


def _save(picture: Image.Image, path: Path) -> None:
    picture.save(path, **({} if path.suffix == ".png" else {"quality": 88}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw small scenes, with captions in metadata.jsonl.")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--count", type=int, default=24, help="how many (24)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes (0)")
    parser.add_argument("--format", choices=("jpg", "png", "webp", "mixed"), default="jpg", help="of the files (jpg)")
    parser.add_argument("--sides", action="store_true", help="draw one group only, on the left or on the right")
    parser.add_argument("--classes", action="store_true", help="draw one group only, into the folder of its kind")
    options = parser.parse_args()
    suffixes = (".jpg", ".png", ".webp") if options.format == "mixed" else (f".{options.format}",)
    if options.classes:
        write_classes(options.folder, options.count, options.seed, suffixes)
    else:
        write_folder(options.folder, options.count, options.seed, suffixes, sides=options.sides)


if __name__ == "__main__":
    main()
