"""`PixelSpec` and `resize` against transformers' own processors, PIL backend: the same bytes, the same floats."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capcli import pixels
from capcli.errors import CapcliError, ImageError
from capcli.pixels import PixelSpec, resizing

DATA = Path(__file__).parents[1].parent / "shared/data"
NO_LIMIT = 10**9
SHAPES = [(1, 1), (1, 500), (500, 1), (2000, 3), (3, 2), (224, 224), (500, 375), (375, 500), (225, 223), (64, 97)]
SIZES = [
    96,
    [80, 112],
    {"height": 60, "width": 100},
    {"shortest_edge": 33},
    {"shortest_edge": 40, "longest_edge": 90},
    {"max_height": 50, "max_width": 70},
]
CLASSES = ["ViT", "DeiT", "Beit", "CLIP", "ChineseCLIP", "Bit", "Blip", "Siglip", "ConvNext", "Donut"]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def real(config: dict[str, Any], folder: Path) -> Any:
    """The processor transformers builds from this config, on its PIL backend."""
    from transformers import AutoImageProcessor

    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert processor.backend == "pil"
    return processor


def real_bytes(processor: Any, image: Image.Image) -> np.ndarray:
    found = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    assert found.dtype == np.uint8
    return np.moveaxis(found, 0, -1)


def assert_same(config: dict[str, Any], images: list[Image.Image], folder: Path) -> None:
    processor, spec = real(config, folder), PixelSpec.from_config(config)
    for image in images:
        expected = real_bytes(processor, image)
        found = pixels.resize(image, spec)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        assert found.flags.writeable
        assert np.array_equal(found, expected), (config, image.size)
        if spec.height is not None:
            assert found.shape == (spec.height, spec.width, 3)


def photos(count: int) -> list[Path]:
    found = sorted((DATA / "photos").rglob("*.jpg"))
    if not found:
        pytest.skip("the photos of ../shared/data are not here")
    return found[:: max(1, len(found) // count)]


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_with_its_defaults(name: str, tmp_path: Path) -> None:
    # Donut's default size is 2560 x 1920: its processor would resize the longest shapes to gigabytes
    shapes = [noise(*shape) for shape in SHAPES[:-1] if name != "Donut" or max(shape) < 100 * min(shape)]
    assert_same({"image_processor_type": f"{name}ImageProcessor"}, shapes, tmp_path)


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_over_photos(name: str, tmp_path: Path) -> None:
    images = [pixels.read(str(path), max_pixels=NO_LIMIT)[0] for path in photos(10)]
    assert_same({"image_processor_type": f"{name}ImageProcessor"}, images, tmp_path)


def test_photos_with_the_processor_of_a_real_checkpoint(tmp_path: Path) -> None:
    path = DATA / "configs/vit-gpt2-image-captioning/preprocessor_config.json"
    if not path.exists():
        pytest.skip("the configs of ../shared/data are not here")
    config = json.loads(path.read_text())
    assert_same(config, [pixels.read(str(photo), max_pixels=NO_LIMIT)[0] for photo in photos(60)], tmp_path)


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_and_filter(size: Any, resample: int, tmp_path: Path) -> None:
    config = {"image_processor_type": "ViTImageProcessor", "size": size, "resample": resample}
    long = isinstance(size, dict) and (
        "longest_edge" in size or "max_height" in size
    )  # an edge would vanish: a failure
    assert_same(config, [noise(*shape) for shape in SHAPES if not (long and max(shape) > 40 * min(shape))], tmp_path)


@pytest.mark.parametrize("name", ["CLIP", "DeiT", "ViT"])
@pytest.mark.parametrize("crop", [30, 31, [77, 40], {"height": 41, "width": 300}, 301])
@pytest.mark.parametrize("resizing", [{"do_resize": False}, {"size": {"shortest_edge": 64}}, {"size": 50}])
def test_crops_smaller_and_larger_than_the_image(
    name: str, crop: Any, resizing: dict[str, Any], tmp_path: Path
) -> None:
    config = {"image_processor_type": f"{name}ImageProcessor", "do_center_crop": True, "crop_size": crop, **resizing}
    assert_same(config, [noise(*shape) for shape in SHAPES], tmp_path)


@pytest.mark.parametrize("edge", [223, 224, 383, 384])
@pytest.mark.parametrize("crop_pct", [{}, {"crop_pct": 0.875}, {"crop_pct": 0.95}])
def test_convnext_crops_below_384(edge: int, crop_pct: dict[str, float], tmp_path: Path) -> None:
    config = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": edge, **crop_pct}
    assert_same(config, [noise(*shape) for shape in SHAPES[4:]], tmp_path)


def test_the_processor_of_resnet(tmp_path: Path) -> None:
    """As microsoft/resnet-101 has it: resized to 256 and cropped to 224, by ImageNet's mean and deviation."""
    config = {
        "crop_pct": 0.875,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 224,
    }
    images = [noise(*shape) for shape in SHAPES[4:]]
    assert_same(config, [*images, noise(640, 427), noise(300, 500)], tmp_path)
    spec = PixelSpec.from_config(config)
    assert (spec.size, spec.crop, spec.mean) == ((256, 256), (224, 224), (0.485, 0.456, 0.406))


PAGES: dict[str, dict[str, Any]] = {
    "a page": {},
    "a wide page": {"size": {"height": 64, "width": 97}},
    "the list of old configs, width first": {"size": [64, 97]},
    "a square": {"size": 80},
    "turned": {"do_align_long_axis": True},
    "turned onto a wide page": {"do_align_long_axis": True, "size": {"height": 64, "width": 97}},
    "not padded": {"do_pad": False, "do_align_long_axis": True},
    "cropped": {"do_center_crop": True, "crop_size": 50},
    "nearest": {"resample": 0},
    "in a file of DonutProcessor": {"image_processor_type": "DonutImageProcessorFast", "resample": 2},
}


@pytest.mark.parametrize("page", PAGES)
def test_donuts_page(page: str, tmp_path: Path) -> None:
    """Resized twice, turned and padded; an image that is too long and thin is a failure."""
    config = {"image_processor_type": "DonutImageProcessor", "size": {"height": 97, "width": 64}, **PAGES[page]}
    assert_same(config, [noise(*shape) for shape in [*SHAPES[4:], (1, 1), (60, 400), (400, 60)]], tmp_path)
    with pytest.raises(ImageError, match="too long and thin"):
        pixels.resize(noise(1, 500), PixelSpec.from_config(config))


def test_an_image_that_does_not_fit_on_the_page_is_a_failure() -> None:
    config = {"image_processor_type": "DonutImageProcessor", "size": 50, "do_resize": False, "do_thumbnail": False}
    with pytest.raises(ImageError, match="60x40 does not fit into the 50x50") as failure:
        pixels.resize(noise(60, 40), PixelSpec.from_config(config))
    assert failure.value.kind == "shape"


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("shape", [(1, 700), (700, 1), (2, 1001), (313, 3), (40, 640), (640, 40)])
def test_long_images_are_resized_in_strips(
    shape: tuple[int, int], resample: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resizing, "WHOLE_RESIZE", 1 << 12)  # so that strips are used for small images too
    for crop in (56, {"height": 90, "width": 30}):
        config = {"image_processor_type": "CLIPImageProcessor", "size": 56, "crop_size": crop, "resample": resample}
        assert_same(config, [noise(*shape)], tmp_path)


@settings(max_examples=500, deadline=None)
@given(height=st.integers(1, 20_000), width=st.integers(1, 20_000), edge=st.integers(1, 900), more=st.integers(0, 900))
def test_resized_edges_round_as_the_processors(height: int, width: int, edge: int, more: int) -> None:
    from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
    from transformers.image_utils import get_image_size_for_max_height_width

    def resized(**size: int) -> tuple[int, int]:
        return PixelSpec.from_config({"image_processor_type": "ViTImageProcessor", "size": size}).resized(height, width)

    image = np.broadcast_to(np.uint8(0), (3, height, width))
    shortest = get_resize_output_image_size(image, edge, default_to_square=False, input_data_format="channels_first")
    assert resized(shortest_edge=edge) == shortest
    between = get_size_with_aspect_ratio((height, width), edge, edge + more)
    assert resized(shortest_edge=edge, longest_edge=edge + more) == between
    within = get_image_size_for_max_height_width((height, width), edge, edge + more)
    assert resized(max_height=edge, max_width=edge + more) == within


def test_a_very_long_image_in_bounded_memory(tmp_path: Path) -> None:
    spec = PixelSpec.from_config({"image_processor_type": "CLIPImageProcessor"})
    for shape in [(1, 5000), (5000, 1)]:  # the processor would resize it to 224 x 1,120,000
        assert pixels.resize(noise(*shape), spec).shape == (224, 224, 3)
    with pytest.raises(ImageError, match="too long and thin") as failure:
        pixels.resize(noise(1, 10000), spec)
    assert failure.value.kind == "shape"
    assert_same({"image_processor_type": "CLIPImageProcessor"}, [noise(3, 1100), noise(1100, 3)], tmp_path)


def test_an_edge_that_vanishes_is_a_failure() -> None:
    size = {"shortest_edge": 40, "longest_edge": 90}
    spec = PixelSpec.from_config({"image_processor_type": "ViTImageProcessor", "size": size})
    with pytest.raises(ImageError, match="vanish"):
        pixels.resize(noise(1, 500), spec)


def test_an_output_without_a_crop_is_bounded() -> None:
    spec = PixelSpec.from_config({"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 384}})
    assert spec.height is None
    with pytest.raises(ImageError, match="too long and thin"):
        pixels.resize(noise(2, 4000), spec)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": 0.3, "image_std": [0.2, 0.3, 0.4]},
        {"rescale_factor": 0.00392156862745098},
    ],
)
@pytest.mark.parametrize("name", CLASSES)
def test_the_documented_arithmetic_gives_the_processors_floats(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = {"image_processor_type": f"{name}ImageProcessor", **changes}
    image, spec = noise(50, 60), PixelSpec.from_config(config)
    expected = np.asarray(real(config, tmp_path)(image, return_tensors="np")["pixel_values"][0])
    rescaled = (pixels.resize(image, spec).astype(np.float64) * spec.rescale_factor).astype(np.float32)
    found = (rescaled - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    assert found.dtype == np.float32
    assert np.array_equal(np.moveaxis(found, -1, 0), expected.astype(np.float32))


def test_old_fast_pil_and_nested_class_names_are_the_same() -> None:
    spec = PixelSpec.from_config({"image_processor_type": "ViTImageProcessor"})
    for name in ["ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor"]:
        assert PixelSpec.from_config({"feature_extractor_type": name}) == spec
    assert PixelSpec.from_config({"image_processor": {"image_processor_type": "ViTImageProcessor"}}) == spec


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("field", ["do_resize", "do_center_crop", "default_to_square", "do_pad"])
def test_a_null_has_the_meaning_that_transformers_gives_it(name: str, field: str, tmp_path: Path) -> None:
    if (name, field) == ("Donut", "default_to_square"):
        pytest.skip("transformers' own processor cannot be run with it")
    config = {"image_processor_type": f"{name}ImageProcessor", "size": 200, "crop_size": 180, field: None}
    assert_same(config, [noise(300, 400), noise(40, 30)], tmp_path)


def test_a_spec_pickles_and_hashes() -> None:
    spec = PixelSpec.from_config({"image_processor_type": "CLIPImageProcessor"})
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(PixelSpec.from_config({"image_processor_type": "CLIPImageProcessor"}))
    assert (spec.height, spec.width) == (224, 224)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", {"longest_edge": 50}),
        ("size", {"height": 50}),
        ("size", "large"),
        ("size", 0),
        ("size", True),
        ("size", [1, 2, 3]),
        ("size", {"shortest_edge": 2.5}),
        ("crop_size", {"shortest_edge": 9}),
        ("resample", 6),
        ("resample", None),
        ("resample", "bicubic"),
        ("image_mean", [0.5, 0.5]),
        ("image_std", 0),
        ("image_std", "half"),
        ("rescale_factor", float("nan")),
        ("do_convert_grayscale", True),
        ("do_thumbnail", True),
        ("use_square_size", True),
        ("image_processor_type", "Pix2StructImageProcessor"),
    ],
)
def test_settings_that_would_change_the_pixels_are_refused_by_name(field: str, value: Any) -> None:
    config = {"image_processor_type": "ViTImageProcessor", "do_center_crop": True, "crop_size": 10, field: value}
    with pytest.raises(CapcliError, match=field):
        PixelSpec.from_config(config)


def test_padding_is_refused_only_where_it_would_pad(tmp_path: Path) -> None:
    assert_same({"image_processor_type": "BlipImageProcessor", "do_pad": True}, [noise(40, 50)], tmp_path)
    for size in [{"shortest_edge": 50}, 50]:
        config = {"image_processor_type": "BlipImageProcessor", "do_pad": True, "size": size, "pad_size": 60}
        with pytest.raises(CapcliError, match="do_pad"):
            PixelSpec.from_config(config)


def test_fields_that_do_not_change_the_pixels_are_ignored() -> None:
    extra = {"do_convert_rgb": True, "do_reduce_labels": True, "do_convert_grayscale": False, "processor_class": "X"}
    plain = {"image_processor_type": "ViTImageProcessor"}
    assert PixelSpec.from_config({**plain, **extra, "auto_map": {}, "crop_pct": 0.5}) == PixelSpec.from_config(plain)
    with pytest.raises(CapcliError, match="image_processor_type"):
        PixelSpec.from_config({"size": 224})
