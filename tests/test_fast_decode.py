"""`--fast-decode`: large JPEGs are decoded at a smaller size; nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import call, change_json, save_captioner

from capcli import pixels
from capcli.options import MAX_PIXELS
from capcli.pixels import PixelSpec

SQUARE = PixelSpec.from_config({"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}})
SHORT = PixelSpec.from_config(
    {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 96},
        "crop_size": {"height": 96, "width": 96},
    }
)
FACTS = ("width", "height", "mode", "format")


def draw(path: Path, width: int, height: int, **save: object) -> Path:
    """Smooth colours with a little noise, like a photo."""
    random = np.random.default_rng(width)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = random.integers(-6, 7, (height, width, 3))
    Image.fromarray((np.asarray(coarse, dtype=int) + grain).clip(0, 255).astype(np.uint8)).save(path, **save)
    return path


def both(path: Path, spec: PixelSpec) -> tuple[np.ndarray, np.ndarray]:
    exact, facts = pixels.load(str(path), spec, max_pixels=MAX_PIXELS, facts=FACTS)
    fast, fast_facts = pixels.load(str(path), spec, max_pixels=MAX_PIXELS, facts=FACTS, fast=True)
    assert facts == fast_facts
    return exact.astype(int), fast.astype(int)


@pytest.mark.parametrize("spec", [SQUARE, SHORT], ids=["exact", "shortest"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path: Path, spec: PixelSpec, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact, fast = both(draw(tmp_path / "large.jpg", 1700, 1100, exif=exif), spec)
    assert exact.shape == fast.shape
    assert (exact != fast).any()
    assert np.abs(exact - fast).mean() < 1
    assert np.abs(exact - fast).max() < 12


@pytest.mark.parametrize(
    ("name", "size"), [("small.jpg", (300, 190)), ("large.png", (900, 700)), ("narrow.jpg", (1600, 190))]
)
def test_small_jpegs_and_other_formats_do_not_change(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    for spec in (SQUARE, SHORT):
        exact, fast = both(draw(tmp_path / name, *size), spec)
        assert (exact == fast).all()


def test_a_run_is_not_resumed_with_the_other_setting(tmp_path: Path) -> None:
    folder = save_captioner(tmp_path / "captioner")
    change_json(folder / "generation_config.json", {"max_new_tokens": 3})
    (tmp_path / "photos").mkdir()
    draw(tmp_path / "photos" / "large.jpg", 1700, 1100)
    run = ("caption", tmp_path / "photos", "--model", folder, "--out", tmp_path / "rows.jsonl")
    assert call(*run, "--fast-decode").code == 0
    draw(tmp_path / "photos" / "more.jpg", 400, 300)
    refused = call(*run)
    assert refused.code == 2
    assert "fast_decode was true, is now not set" in refused.err
    assert call(*run, "--fast-decode").code == 0
