"""Captions of a scene: written, parsed and judged."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from scene import COLOURS, KINDS, MOST_OF_A_KIND, Group, Scene

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
    parsed = read(caption)
    if parsed is None:
        return Verdict(False, False, False, False, False)
    weather = parsed.weather in (None, scene.weather)
    straight = _compare((parsed.first, parsed.second), scene, parsed.relation == scene.relation, weather)
    crossed = _compare((parsed.second, parsed.first), scene, False, weather)
    return max(straight, crossed, key=lambda v: (v.object + v.colour + v.count + v.relation, v.object))


def _compare(parsed: tuple[Group, Group], scene: Scene, relation: bool, weather: bool) -> Verdict:
    pairs = tuple(zip(parsed, (scene.first, scene.second), strict=True))
    return Verdict(
        object=all(a.kind == b.kind for a, b in pairs),
        colour=all(a.colour == b.colour for a, b in pairs),
        count=all(a.count == b.count for a, b in pairs),
        relation=relation,
        weather=weather,
    )
