"""Scenes as pictures."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw
from scene import COLOURS, KINDS, Frame, Group, Rgb, Scene, Thing, place

PICTURE_SIZE = 256


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
