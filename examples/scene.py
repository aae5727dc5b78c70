"""What a scene is: kinds, colours and groups; made up at random, and put into its places."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

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


WEATHERS = ("sunny", "cloudy", "rain", "snow", "night")


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
    return Scene(key, first, relation, second, rng.choice(WEATHERS))


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
