"""`--gpu-decode`: plain JPEGs leave their process undecoded and are decoded in batches; nothing else changes.

libjpeg decodes in place of nvJPEG, except in the tests that need a GPU.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import misbehaving
import numpy as np
import pytest
import torch
from PIL import Image
from running import call, save_captioner
from test_fast_decode import SHORT, SQUARE, draw
from torch import Tensor

from capcli import Captioner, pixels
from capcli.captioning.backends import slots_plan as plan
from capcli.errors import CapcliError, ImageError, UsageError
from capcli.loading import Decode, load
from capcli.loading.gpu_jpeg import Decoder, GpuJpegDecoder, GpuLoading, rates, refuse_gpu_decode, resized
from capcli.options import MAX_PIXELS, CaptionOptions, SinkOptions, SourceOptions
from capcli.pixels import PixelSpec
from capcli.records import Entry, Failure, Loaded
from capcli.storage.run_file import RunFile

PAD = PixelSpec.from_config(
    {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": False,
        "crop_size": {"height": 96, "width": 200},
    }
)
LARGE = PixelSpec.from_config({"image_processor_type": "BlipImageProcessor", "size": {"height": 250, "width": 250}})
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def libjpeg(files: Sequence[Tensor]) -> list[Tensor]:
    """All files decoded, or RuntimeError, as torchvision's decoder raises."""
    images = []
    for file in files:
        try:
            image = Image.open(io.BytesIO(file.numpy().tobytes()))
            images.append(torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()))
        except OSError as error:
            raise RuntimeError("something is wrong with one of them") from error
    return images


def assert_close(found: np.ndarray, exact: np.ndarray) -> None:
    """Equal except for rounding."""
    differences = np.abs(found.astype(int) - exact)
    assert differences.max() <= 2
    assert differences.mean() < 0.2


KEEP = partial(pixels.load_or_keep, spec=SQUARE, max_pixels=MAX_PIXELS, facts=("width",))
WHOLE = partial(pixels.load, spec=SQUARE, max_pixels=MAX_PIXELS, facts=("width",))


def on_gpu(entries: Iterable[Entry], jpegs: GpuJpegDecoder, whole: Decode = WHOLE, **load_options: float) -> GpuLoading:
    return GpuLoading(entries, jpegs, KEEP, whole, partial(load, workers=2, **load_options))


def keep(path: Path, spec: PixelSpec = SQUARE) -> np.ndarray:
    return pixels.load_or_keep(str(path), spec, max_pixels=MAX_PIXELS)[0]


@pytest.mark.parametrize("spec", [SQUARE, SHORT, PAD, LARGE], ids=["exact", "shortest", "padded", "bicubic"])
@pytest.mark.parametrize("size", [(640, 428), (97, 300), (96, 96), (30, 40), (333, 500)], ids=str)
def test_pixels_equal_the_processors_except_for_rounding(
    tmp_path: Path, spec: PixelSpec, size: tuple[int, int]
) -> None:
    path = draw(tmp_path / "photo.jpg", *size)
    exact, _ = pixels.load(str(path), spec, max_pixels=MAX_PIXELS)
    [found] = GpuJpegDecoder(spec, libjpeg)([keep(path, spec)])
    assert isinstance(found, np.ndarray)
    assert found.shape == exact.shape
    assert found.dtype == exact.dtype
    assert found.flags["C_CONTIGUOUS"]
    assert_close(found, exact)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("photo.png", {}),
        ("cmyk.jpg", {"mode": "CMYK"}),
        ("grey.jpg", {"mode": "L"}),
        ("turned.jpg", {"orientation": 6}),
        ("rgb.jpg", {"keep_rgb": True}),
        ("progressive.jpg", {"progressive": True}),
        ("trailing.jpg", {"more": b"\0\0"}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_other_files_than_plain_jpegs_are_decoded_in_the_process(
    tmp_path: Path, name: str, save: dict[str, object]
) -> None:
    path = tmp_path / name
    image = Image.open(draw(tmp_path / "drawn.png", 300, 200)).convert(str(save.pop("mode", "RGB")))
    exif, more = Image.Exif(), save.pop("more", b"")
    exif[0x0112] = save.pop("orientation", 1)
    image.save(path, exif=exif, **save)
    with open(path, "ab") as file:
        file.write(more)
    facts = ("width", "height", "mode", "format", "bytes", "sha256")
    exact = pixels.load(str(path), SQUARE, max_pixels=MAX_PIXELS, facts=facts)
    kept = pixels.load_or_keep(str(path), SQUARE, max_pixels=MAX_PIXELS, facts=facts)
    assert (exact[0] == kept[0]).all()
    assert exact[1] == kept[1]


def test_a_kept_file_has_the_facts_of_a_decoded_one(tmp_path: Path) -> None:
    path = draw(tmp_path / "photo.jpg", 300, 200)
    facts = ("width", "height", "mode", "format", "bytes", "sha256")
    data, found = pixels.load_or_keep(str(path), SQUARE, max_pixels=MAX_PIXELS, facts=facts)
    assert data.tobytes() == path.read_bytes()
    assert found == pixels.load(str(path), SQUARE, max_pixels=MAX_PIXELS, facts=facts)[1]


@pytest.mark.parametrize(
    ("damage", "kind"),
    [(b"", "empty"), (b"\xff\xd8\xff", "unreadable"), (b"no picture", "unknown-format"), (None, "missing")],
)
def test_failures_equal_those_of_decoding(tmp_path: Path, damage: bytes | None, kind: str) -> None:
    path = tmp_path / "photo.jpg"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(ImageError) as error:
        keep(path)
    assert error.value.kind == kind
    with pytest.raises(ImageError, match="more than the limit of 100"):
        pixels.load_or_keep(str(draw(tmp_path / "large.jpg", 30, 20)), SQUARE, max_pixels=100)
    thin = PixelSpec.from_config({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 2000}})
    with pytest.raises(ImageError, match="too long and thin"):
        pixels.load_or_keep(str(draw(tmp_path / "thin.jpg", 3000, 1)), thin, max_pixels=MAX_PIXELS)


def test_a_file_that_cannot_be_decoded_does_not_affect_the_others(tmp_path: Path) -> None:
    files = [keep(draw(tmp_path / f"{n}.jpg", 100 + n, 90)) for n in range(9)]
    whole = GpuJpegDecoder(SQUARE, libjpeg)(files)
    files[4] = np.frombuffer(files[4].tobytes()[:500], np.uint8).copy()
    for index, (each, before) in enumerate(zip(GpuJpegDecoder(SQUARE, libjpeg)(files), whole, strict=True)):
        assert each is None if index == 4 else np.array_equal(each, before)


def test_an_image_that_the_decoder_skips_is_decoded_by_a_process(tmp_path: Path) -> None:
    path = str(draw(tmp_path / "photo.jpg", 120, 90))
    exact, _ = pixels.load(path, SQUARE, max_pixels=MAX_PIXELS)
    black = GpuJpegDecoder(SQUARE, lambda files: [torch.zeros(3, 90, 120, dtype=torch.uint8) for _ in files])
    with on_gpu([Entry(path, path)], black) as images:
        result = images.take()
    assert isinstance(result, Loaded)
    assert np.array_equal(result.pixels, exact)


def refuse(files: Sequence[Tensor]) -> list[Tensor]:
    raise ValueError(f"none of {len(files)}")


def test_images_that_the_gpu_cannot_decode_have_the_time_limit(tmp_path: Path) -> None:
    paths = [str(draw(tmp_path / f"{n}.jpg", 200, 90)) for n in range(3)]
    entries = [Entry(path, path) for path in paths]
    with on_gpu(entries, GpuJpegDecoder(SQUARE, refuse), whole=misbehaving.slow_on_the_second, timeout=1.0) as images:
        found = [images.take(30) for _ in range(3)]
    assert [type(each) for each in found] == [Loaded, Failure, Loaded]
    assert isinstance(found[1], Failure)
    assert found[1].error == "timeout"


@pytest.mark.parametrize("decode", [libjpeg, refuse], ids=["decoded", "refused"])
def test_images_come_in_order_whatever_their_kind(tmp_path: Path, decode: Decoder) -> None:
    paths = []
    for n in range(40):
        path = tmp_path / f"{n:02}{('.jpg', '.png', '.jpg')[n % 3]}"
        draw(path, 100 + n, 90)
        if n % 7 == 3:
            path.write_bytes(path.read_bytes()[:700])
        paths.append(str(path))
    entries = [Entry(path, path, encoder_ids=(n,)) for n, path in enumerate(paths)]
    expected = list(load(entries, WHOLE, workers=2))
    found: list[Loaded | Failure] = []
    with on_gpu(entries, GpuJpegDecoder(SQUARE, decode)) as images:
        while not images.done:
            if (result := images.take(5)) is not None:
                found.append(result)
    assert images.take() is None
    assert [each.name for each in found] == paths
    for each, wanted in zip(found, expected, strict=True):
        if isinstance(wanted, Failure):
            assert each == wanted
        else:
            assert isinstance(each, Loaded)
            assert (each.facts, each.encoder_ids) == (wanted.facts, wanted.encoder_ids)
            assert_close(each.pixels, wanted.pixels)


def test_an_error_of_the_source_comes_after_its_images(tmp_path: Path) -> None:
    path = str(draw(tmp_path / "photo.jpg", 100, 90))

    def entries():
        yield Entry(path, path)
        raise CapcliError("the list ended in the middle")

    with on_gpu(entries(), GpuJpegDecoder(SQUARE, libjpeg)) as images:
        assert isinstance(images.take(), Loaded)
        with pytest.raises(CapcliError, match="ended in the middle"):
            images.take()
        assert images.done


@pytest.mark.parametrize("decode", [libjpeg, refuse], ids=["decoded", "refused"])
def test_closing_ends_at_once_while_no_results_are_taken(tmp_path: Path, decode: Decoder) -> None:
    path = str(draw(tmp_path / "photo.jpg", 100, 90))
    entries = (Entry(f"{n}", path) for n in range(10**9))
    images = on_gpu(entries, GpuJpegDecoder(SQUARE, decode))
    assert isinstance(images.take(), Loaded)
    time.sleep(1)  # until the queue is full
    began = time.monotonic()
    images.close()
    assert time.monotonic() - began < 10


def test_a_gpu_decodes_where_it_is_faster_and_a_resumed_run_keeps_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_captioner(tmp_path / "captioner")
    model = Captioner.load(str(tmp_path / "captioner"), device="cpu").core.model
    asked = CaptionOptions(SourceOptions(), SinkOptions(out="rows.jsonl"), gpu_decode=True, workers=8)
    monkeypatch.setattr(GpuJpegDecoder, "on", lambda _, spec: GpuJpegDecoder(spec, libjpeg))
    assert all(rate > 0 for rate in rates(GpuJpegDecoder(SQUARE, libjpeg)))
    assert not plan.settle_gpu_decode(replace(asked, workers=10_000), model, None).gpu_decode
    assert "--gpu-decode has no effect: the GPU decodes" in capsys.readouterr().err
    monkeypatch.setattr(plan, "rates", lambda _: (9.0, 1.0))
    assert plan.settle_gpu_decode(asked, model, None).gpu_decode
    monkeypatch.setattr(plan, "rates", lambda _: (7.0, 1.0))
    assert plan.settle_gpu_decode(asked, model, RunFile({"settings": {"gpu_decode": True}})).gpu_decode
    assert capsys.readouterr().err == ""
    assert not plan.settle_gpu_decode(asked, model, RunFile({"settings": {}})).gpu_decode
    assert "rows.jsonl was started without it" in capsys.readouterr().err


def test_a_gpu_that_decodes_nothing_is_an_error() -> None:
    with pytest.raises(CapcliError, match=r"decodes no JPEG on this GPU \(none of 64\)"):
        rates(GpuJpegDecoder(SQUARE, refuse))


def test_impossible_options_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    save_captioner(tmp_path / "captioner")
    draw(tmp_path / "photo.jpg", 100, 90)
    run = ("caption", tmp_path / "photo.jpg", "--model", tmp_path / "captioner")
    done = call(*run, "--gpu-decode", "--device", "cpu")
    assert done.code == 2
    assert "--gpu-decode is for CUDA, and this run is on the CPU: leave it out" in done.err
    done = call(*run, "--gpu-decode", "--fast-decode")
    assert done.code == 2
    assert "give one of them" in done.err
    done = call(*run, "--gpu-decode", "--workers", 0)
    assert done.code == 2
    assert "leave --workers 0 out" in done.err
    lanczos = PixelSpec.from_config({"image_processor_type": "ViTImageProcessor", "resample": 1})
    with pytest.raises(UsageError, match="this model's processor uses lanczos"):
        refuse_gpu_decode(lanczos, torch.device("cuda"))


def test_sizes_that_need_no_resizing_keep_every_pixel() -> None:
    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
    assert torch.equal(resized(image, SQUARE), image.permute(1, 2, 0))


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("size", [(640, 428), (1001, 333)], ids=str)
def test_nvjpeg_decodes_what_libjpeg_does(tmp_path: Path, size: tuple[int, int]) -> None:
    pytest.importorskip("torchvision")
    device = torch.device("cuda:0")
    refuse_gpu_decode(SQUARE, device)
    paths = [draw(tmp_path / f"{n}.jpg", size[0] + n, size[1], quality=60 + 6 * n) for n in range(6)]
    for path, found in zip(paths, GpuJpegDecoder.on(device, SQUARE)([*map(keep, paths)]), strict=True):
        exact, _ = pixels.load(str(path), SQUARE, max_pixels=MAX_PIXELS)
        assert np.abs(found.astype(int) - exact).mean() < 1
        assert np.abs(found.astype(int) - exact).max() < 12


@pytest.mark.gpu
@no_cuda
def test_a_run_with_gpu_decode_captions_all(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    save_captioner(tmp_path / "captioner")
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(20):
        draw(photos / f"{n}.jpg", 300 + n, 200)
    (photos / "bad.jpg").write_bytes((photos / "3.jpg").read_bytes()[:999])
    done = call("caption", photos, "--model", tmp_path / "captioner", "--device", "cuda", "--gpu-decode", "-o", "-")
    assert done.code == 3, done.err
    assert len(done.rows) == 20
