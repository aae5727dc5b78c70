"""`PixelSpec`: the settings of a checkpoint's image processor, read from its preprocessor_config.json.

The classes and their defaults are those of transformers' PIL backend (5.17 to 5.23), read from
`transformers/models/*/image_processing_pil_*.py`; the tests compare both with the real processors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from capcli.errors import CapcliError

Rule = Literal["keep", "exact", "shortest", "between", "within"]
Triple = tuple[float, float, float]

HALF: Triple = (0.5, 0.5, 0.5)
CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING = range(6)  # Pillow's numbers; transformers accepts no others

COMMON: Mapping[str, Any] = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_pad": False,
    "pad_size": None,
    "crop_size": None,
    "default_to_square": True,
    "resample": BICUBIC,
    "image_mean": HALF,
    "image_std": HALF,
}
CLIP_LIKE = {
    **CLIP,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "crop_size": 224,
    "do_center_crop": True,
}
CLASSES: Mapping[str, Mapping[str, Any]] = {
    "BeitImageProcessor": {"size": 224, "crop_size": 224},
    "BitImageProcessor": CLIP_LIKE,
    "BlipImageProcessor": {**CLIP, "size": 384},
    "CLIPImageProcessor": CLIP_LIKE,
    "ChineseCLIPImageProcessor": CLIP_LIKE,
    "ConvNextImageProcessor": {"size": {"shortest_edge": 384}, "default_to_square": False, "crop_pct": 224 / 256},
    "DeiTImageProcessor": {"size": 256, "crop_size": 224, "do_center_crop": True},
    "DonutImageProcessor": {
        "size": {"height": 2560, "width": 1920},
        "resample": BILINEAR,
        "do_align_long_axis": False,
        "do_thumbnail": True,
        "do_pad": True,
    },
    "SiglipImageProcessor": {"size": {"height": 224, "width": 224}, "default_to_square": False},
    "ViTImageProcessor": {"size": 224, "resample": BILINEAR},
}
# Switches that do not change the pixels of these classes: the images are RGB already, and labels are not pixels.
HARMLESS = {"do_convert_rgb", "do_reduce_labels"}


@dataclass(frozen=True, slots=True)
class Canvas:
    """Donut's page of `size` (height, width), to which an image is fitted in three optional steps.

    `align`: before it is resized, an image whose long edge lies along the short edge of the page is turned by 90 degrees
    clockwise. `thumbnail`: after it is resized, it is resized again to fit into the page. `pad`: it is put into the middle
    of the page, which is black.
    """

    size: tuple[int, int]
    align: bool
    thumbnail: bool
    pad: bool

    def turns(self, height: int, width: int) -> bool:
        """Whether an image of this size is turned."""
        down, across = self.size
        return self.align and ((across < down and width > height) or (across > down and width < height))

    def reduced(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as a thumbnail; an edge may be 0. A thumbnail of an image that is not resized first may not fit."""
        down, across = min(height, self.size[0]), min(width, self.size[1])
        if not self.thumbnail or (down, across) == (height, width):
            return height, width
        if height > width:
            return down, int(width * down / height)
        return (int(height * across / width), across) if width > height else (down, across)


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """How an RGB image becomes pixels, and how pixels become the model's input.

    `rule` and `size` determine the resized size: "keep" does not resize; "exact" is (height, width); "shortest" makes the
    shorter edge size[0]; "between" does the same unless the longer edge would exceed size[1]; "within" is the largest size
    that fits into (height, width). `canvas` is the page that the image is fitted to, if there is one. `crop` is the
    (height, width) then cut from the centre, black where the image is smaller.

    The model's input is computed from the uint8 pixels p, channel by channel, and equals the processor's float32 results
    bit for bit:

        x = float32(float64(p) * float64(rescale_factor))
        x = (x - float32(mean)) / float32(std)              # both in float32; a division, not a product

    A processor that does not rescale has rescale_factor 1.0; one that does not normalise has mean 0 and std 1. The two
    lines then have no effect. p has 256 values, so the first line is a table of 256 float32.
    """

    rule: Rule
    size: tuple[int, int]
    resample: int
    crop: tuple[int, int] | None
    rescale_factor: float
    mean: Triple
    std: Triple
    canvas: Canvas | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PixelSpec:
        """Read a parsed preprocessor_config.json, or a processor_config.json that nests one under "image_processor".

        Absent fields take the default of the processor class that the config names. A null turns its step off, as in
        transformers. A setting that would change the pixels in a way not implemented here is refused.

        Raises:
            CapcliError: the class is not in `CLASSES`, or a setting is malformed or not supported; the message names it.
        """
        config = config.get("image_processor", config)
        settings = _settings(config)
        canvas = _canvas(settings) if "do_thumbnail" in settings else None
        rule, size = _resize_rule(settings) if canvas is None else _page_rule(canvas, settings)
        crop = _crop(settings)
        if "crop_pct" in settings:
            rule, size, crop = _convnext(rule, size, crop, settings["crop_pct"])
        spec = cls(
            rule=rule,
            size=size,
            resample=_filter(settings["resample"]) if settings["do_resize"] or canvas else NEAREST,
            crop=crop,
            rescale_factor=_number(settings["rescale_factor"], "rescale_factor") if settings["do_rescale"] else 1.0,
            mean=_triple(settings, "image_mean") if settings["do_normalize"] else (0.0, 0.0, 0.0),
            std=_triple(settings, "image_std") if settings["do_normalize"] else (1.0, 1.0, 1.0),
            canvas=canvas,
        )
        if 0.0 in spec.std:
            raise _refusal("image_std", settings["image_std"])
        if canvas is None:
            _refuse_padding(spec, settings)
        return spec

    @property
    def height(self) -> int | None:
        """Height of the pixels, or None when it depends on the image."""
        return self._fixed[0] if self._fixed else None

    @property
    def width(self) -> int | None:
        """Width of the pixels, or None when it depends on the image."""
        return self._fixed[1] if self._fixed else None

    @property
    def _fixed(self) -> tuple[int, int] | None:
        page = self.canvas.size if self.canvas and self.canvas.pad else None
        return self.crop or page or (self.size if self.rule == "exact" else None)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing an image of this size, before canvas and crop; an edge may be 0."""
        if self.rule == "keep":
            return height, width
        if self.rule == "exact":
            return self.size
        if self.rule == "shortest":
            return _shortest(height, width, self.size[0])
        if self.rule == "between":
            return _between(height, width, *self.size)
        scale = min(self.size[0] / height, self.size[1] / width)
        return int(height * scale), int(width * scale)


def _shortest(height: int, width: int, edge: int) -> tuple[int, int]:
    """transformers' `get_resize_output_image_size`: the order of operations determines how the long edge rounds."""
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def _between(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """transformers' `get_size_with_aspect_ratio`: the longer edge is computed from the unrounded shorter one."""
    low, high = float(min(height, width)), float(max(height, width))
    edge, exact = shortest, float(shortest)
    if high / low * shortest > longest:
        exact = longest * low / high
        edge = round(exact)
    if min(height, width) == edge:
        return height, width
    if width < height:
        return int(exact * height / width), edge
    return edge, int(exact * width / height)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the class, updated from the config; only ConvNext has and reads "crop_pct"."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    if not isinstance(name, str):
        raise CapcliError(
            "The preprocessor config names no image processor, and the model's type has none that is known: add "
            "image_processor_type to preprocessor_config.json"
        )
    base = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if base not in CLASSES:
        raise CapcliError(f"image_processor_type={name!r} is not supported; these are: {', '.join(sorted(CLASSES))}.")
    settings = {**COMMON, **CLASSES[base]}
    for field, value in config.items():
        switch = field.startswith("do_") or field == "use_square_size"
        if switch and value and field not in settings and field not in HARMLESS:
            raise _refusal(field, value)
        if field in settings:
            settings[field] = value
    return settings


def _resize_rule(settings: Mapping[str, Any]) -> tuple[Rule, tuple[int, int]]:
    if not settings["do_resize"]:
        return "keep", (0, 0)
    size = settings["size"]
    if isinstance(size, Mapping):
        edges = {name: edge for name, edge in size.items() if edge is not None}
        rules: dict[frozenset[str], tuple[Rule, str, str]] = {
            frozenset({"height", "width"}): ("exact", "height", "width"),
            frozenset({"shortest_edge"}): ("shortest", "shortest_edge", "shortest_edge"),
            frozenset({"shortest_edge", "longest_edge"}): ("between", "shortest_edge", "longest_edge"),
            frozenset({"max_height", "max_width"}): ("within", "max_height", "max_width"),
        }
        if frozenset(edges) not in rules:
            raise _refusal("size", size)
        rule, first, second = rules[frozenset(edges)]
        return rule, (_edge(edges[first], "size"), _edge(edges[second], "size"))
    if isinstance(size, int) and not settings["default_to_square"]:
        return "shortest", (_edge(size, "size"), _edge(size, "size"))
    return "exact", _pair(size, "size")


def _canvas(settings: Mapping[str, Any]) -> Canvas:
    """Donut's page: of its old configs, a size in a list is [width, height]."""
    size = settings["size"]
    if isinstance(size, Mapping):
        if set(size) != {"height", "width"}:
            raise _refusal("size", size)
        size = (size["width"], size["height"])
    width, height = _pair(size, "size")
    return Canvas(
        (height, width),
        align=bool(settings["do_align_long_axis"]),
        thumbnail=bool(settings["do_thumbnail"]),
        pad=bool(settings["do_pad"]),
    )


def _page_rule(canvas: Canvas, settings: Mapping[str, Any]) -> tuple[Rule, tuple[int, int]]:
    """Donut resizes the shorter edge of an image to that of its page."""
    edge = min(canvas.size)
    return ("shortest", (edge, edge)) if settings["do_resize"] else ("keep", (0, 0))


def _crop(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    if not settings["do_center_crop"]:
        return None
    size = settings["crop_size"]
    if isinstance(size, Mapping):
        if set(size) != {"height", "width"}:
            raise _refusal("crop_size", size)
        size = (size["height"], size["width"])
    return _pair(size, "crop_size")


def _convnext(
    rule: Rule, size: tuple[int, int], crop: tuple[int, int] | None, crop_pct: Any
) -> tuple[Rule, tuple[int, int], tuple[int, int] | None]:
    """ConvNext's own resize: below 384 a larger shortest edge and a crop, from 384 on a square without one."""
    if rule == "keep":
        return rule, size, crop
    if rule != "shortest":
        raise CapcliError("size: a ConvNextImageProcessor needs {'shortest_edge': N}.")
    edge = size[0]
    if edge >= 384:
        return "exact", (edge, edge), crop
    if crop not in (None, (edge, edge)):
        raise _refusal("crop_size", crop)
    larger = int(edge / _number(crop_pct, "crop_pct"))
    return "shortest", (larger, larger), (edge, edge)


def _refuse_padding(spec: PixelSpec, settings: Mapping[str, Any]) -> None:
    """Padding is rejected unless it has no effect: all images have one size, and no larger one is set."""
    if not settings["do_pad"]:
        return
    fixed = spec.height is not None
    if not fixed or settings["pad_size"] not in (None, {"height": spec.height, "width": spec.width}):
        raise _refusal("do_pad", settings["do_pad"])


def _pair(value: Any, field: str) -> tuple[int, int]:
    """N or [height, width]."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return _edge(value[0], field), _edge(value[1], field)
    return _edge(value, field), _edge(value, field)


def _edge(value: Any, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refusal(field, value)
    return value


def _filter(value: Any) -> int:
    if not isinstance(value, int) or value not in range(6):
        raise _refusal("resample", value)
    return value


def _number(value: Any, field: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise _refusal(field, value)
    return float(value)


def _triple(settings: Mapping[str, Any], field: str) -> Triple:
    """One number for all channels, or one per channel."""
    value = settings[field]
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or not all(isinstance(each, int | float) and math.isfinite(each) for each in values):
        raise _refusal(field, value)
    return float(values[0]), float(values[1]), float(values[2])


def _refusal(field: str, value: object) -> CapcliError:
    return CapcliError(f"The image processor's setting {field}={value!r} is not supported: it would change the pixels.")
