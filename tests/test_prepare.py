"""`capcli prepare`: the copy's content, what is left out, and that a killed run resumes to the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from running import Ended, call, ended, paint, shell, spawn, wait_until

from capcli.annotations import read_split
from capcli.errors import CapcliError, ImageError
from capcli.options import DataOptions
from capcli.records import Stored
from capcli.sources.dataset_images import StoredImages, address_of

REAL = Path(__file__).parents[2] / "shared" / "data"


def annotate(path: Path, captions: dict[str, list[str]]) -> Path:
    """A JSONL file of images' captions."""
    path.write_text(
        "".join(json.dumps({"file_name": name, "captions": texts}) + "\n" for name, texts in captions.items())
    )
    return path


def photos(folder: Path, count: int) -> Path:
    """Painted images with two captions each; the annotations' path."""
    names = [f"photo {number}.png" for number in range(count)]
    paint(folder, *names)
    return annotate(folder / "captions.jsonl", {name: [f"picture {name}", "a blur"] for name in names})


def prepare(data: Path, out: Path, *arguments: object) -> Ended:
    return call("prepare", "--data", data, "--out", out, "--workers", 0, *arguments)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def failures(out: Path) -> list[dict[str, Any]]:
    path = out / "failures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def stored(out: Path, split: str = "train") -> dict[str, dict[str, Any]]:
    """The rows of a split, by name, their images as the bytes of files."""
    rows = datasets.load_from_disk(str(out))[split].cast_column("image", datasets.Image(decode=False))
    return {row["file_name"]: row for row in rows}


def picture_of(row: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"]))


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    return Image.fromarray((np.stack([x, y, 1 - x], axis=-1) * 255).astype(np.uint8))


# Content of the copy


def test_the_copy_is_a_dataset_with_all_captions(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 7)
    ran = prepare(data, tmp_path / "out", "--val-fraction", 0.3, "--shard-size", 2)
    assert ran.code == 0, ran.err
    copy = datasets.load_from_disk(str(tmp_path / "out"))
    assert {name: len(split) for name, split in copy.items()} == {"train": 5, "val": 2}
    rows = stored(tmp_path / "out") | stored(tmp_path / "out", "val")
    assert sorted(rows) == [f"photo {number}.png" for number in range(7)]
    for name, row in rows.items():
        assert row["captions"] == [f"picture {name}", "a blur"]
        original = Image.open(tmp_path / "in" / name)
        assert (row["width"], row["height"]) == original.size == picture_of(row).size
        assert picture_of(row).format == "JPEG"
        gap = np.asarray(picture_of(row)).astype(int) - np.asarray(original.convert("RGB"))
        assert abs(gap).mean() < 3
    assert sorted(os.listdir(tmp_path / "out")) == ["dataset_dict.json", "manifest.json", "train", "val"]
    assert "7 images, 14 captions" in ran.err


def test_images_are_upright_rgb_small_and_without_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tall = gradient(600, 300).transpose(Image.Transpose.ROTATE_90)
    tall.save(folder / "turned.jpg", exif=exif, icc_profile=profile, quality=95, comment=b"secret")
    gradient(600, 300).save(folder / "wide.png", icc_profile=profile)
    gradient(301, 800).convert("CMYK").save(folder / "print.jpg", quality=95)
    gradient(90, 70).quantize(256).save(folder / "small.gif")
    data = annotate(folder / "c.jsonl", {path.name: ["x"] for path in sorted(folder.iterdir())})
    assert prepare(data, tmp_path / "out", "--edge", 150).code == 0
    rows = stored(tmp_path / "out")
    sizes = {name: (row["width"], row["height"]) for name, row in rows.items()}
    assert sizes == {"turned.jpg": (300, 150), "wide.png": (300, 150), "print.jpg": (150, 399), "small.gif": (90, 70)}
    for name, row in rows.items():
        picture = picture_of(row)
        assert (picture.size, picture.mode) == (sizes[name], "RGB")
        assert not picture.getexif()
        assert not {"icc_profile", "exif", "comment"} & picture.info.keys()
        assert b"camera" not in row["image"]["bytes"]
        width, height = sizes[name]
        assert abs(np.asarray(picture).astype(int) - np.asarray(gradient(width, height))).mean() < 12, name


@pytest.mark.parametrize(("kind", "loss"), [("png", 0), ("webp", 6), ("jpeg", 3)])
def test_formats(kind: str, loss: float, tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 2)
    assert prepare(data, tmp_path / "out", "--format", kind).code == 0
    for name, row in stored(tmp_path / "out").items():
        assert picture_of(row).format == kind.upper()
        original = np.asarray(Image.open(tmp_path / "in" / name).convert("RGB")).astype(int)
        assert abs(np.asarray(picture_of(row)) - original).mean() <= loss


def test_quality_decides_the_size(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 1)
    sizes = []
    for quality in (30, 95):
        out = tmp_path / str(quality)
        assert prepare(data, out, "--quality", quality).code == 0
        sizes.append(len(next(iter(stored(out).values()))["image"]["bytes"]))
    assert sizes[0] < sizes[1] * 0.7


def test_names_and_captions_of_every_kind(tmp_path: Path) -> None:
    names = ["a b/ü 日本.png", "new\nline.png", "emoji 🎉.png", os.fsdecode(b"raw \xff.png")]
    paint(tmp_path / "in", *names)
    rows = [{"file_name": name, "text": f"日本 🎉 {number}"} for number, name in enumerate(names[:3])]
    rows.append({"file_name": "raw \ufffd.png", "file_name_bytes": "cmF3IP8ucG5n", "text": "3"})
    data = tmp_path / "in" / "c.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare(data, tmp_path / "out").code == 0
    copies = stored(tmp_path / "out")
    assert list(copies) == [*names[:3], "raw \ufffd.png"]
    assert [row["captions"] for row in copies.values()] == [["日本 🎉 0"], ["日本 🎉 1"], ["日本 🎉 2"], ["3"]]
    assert [row["file_name_bytes"] for row in copies.values()] == [None, None, None, "cmF3IP8ucG5n"]


def test_a_copy_can_be_made_of_a_copy(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 5)
    assert prepare(data, tmp_path / "one", "--val-fraction", 0.3, "--format", "png").code == 0
    ran = call("prepare", "--data", tmp_path / "one", "--out", tmp_path / "two", "--edge", 16, "--workers", 1)
    assert ran.code == 0, ran.err
    for split in ("train", "val"):
        one, two = stored(tmp_path / "one", split), stored(tmp_path / "two", split)
        assert list(one) == list(two)
        for name, row in two.items():
            assert row["captions"] == one[name]["captions"]
            assert min(row["width"], row["height"]) == 16
            small = picture_of(one[name]).resize((row["width"], row["height"]), Image.Resampling.LANCZOS)
            assert abs(np.asarray(picture_of(row)).astype(int) - np.asarray(small)).mean() < 4


def test_options_from_a_file(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 2)
    config = tmp_path / "c.toml"
    config.write_text(f"[data]\ndata = {str(data)!r}\n[prepare]\nedge = 12\nformat = 'png'\nworkers = 0\n")
    assert call("prepare", "--config", config, "--out", tmp_path / "out", "--edge", 20).code == 0
    assert manifest(tmp_path / "out")["settings"]["format"] == "png"
    assert {min(row["width"], row["height"]) for row in stored(tmp_path / "out").values()} == {20}


def test_a_number_in_place_of_paths_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[data]\ndata = 3\n")
    ran = call("prepare", "--config", config, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "data is 3; it must be a text in quotes, or a list of them" in ran.err


@pytest.mark.skipif(not REAL.exists(), reason="needs the shared data")
def test_real_photos(tmp_path: Path) -> None:
    captions = REAL / "photos" / "coco" / "coco_captions.json"
    captions = captions if captions.exists() else REAL / "photos" / "coco_captions.json"
    ran = call("prepare", "--data", captions, "--out", tmp_path / "out", "--edge", 128, "--workers", 2)
    assert ran.code == 0, ran.err
    rows = stored(tmp_path / "out")
    assert len(rows) == 80
    assert {min(picture_of(row).size) for row in rows.values()} == {128}
    assert all(len(row["captions"]) >= 5 for row in rows.values())


# What is left out


def hostile(folder: Path) -> Path:
    """Good images and bad ones; the annotations' path."""
    paint(folder, "good.png", "cut.png", "other.png", "thin.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:200])
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "empty.jpg").touch()
    Image.new("RGB", (70_000, 2)).save(folder / "thin.png")
    names = ["good.png", "cut.png", "page.jpg", "empty.jpg", "other.png", "thin.png", "gone.png"]
    return annotate(folder / "c.jsonl", {name: ["a caption"] for name in names} | {"good.png": ["one", " ", "two"]})


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_stored_are_listed(workers: int, tmp_path: Path) -> None:
    data = hostile(tmp_path / "in")
    ran = prepare(data, tmp_path / "out", "--workers", workers)
    assert ran.code == 3
    assert "5 images and 1 empty caption left out" in ran.err
    assert str(tmp_path / "out" / "failures.jsonl") in ran.err
    rows = stored(tmp_path / "out")
    assert list(rows) == ["good.png", "other.png"]
    assert rows["good.png"]["captions"] == ["one", "two"]
    kinds = {row["file_name"]: row["error"] for row in failures(tmp_path / "out")}
    assert kinds == {
        "good.png": "empty-caption",
        "gone.png": "missing",
        "cut.png": "unreadable",
        "page.jpg": "unknown-format",
        "empty.jpg": "empty",
        "thin.png": "shape",
    }
    values = manifest(tmp_path / "out")
    assert (values["images_left_out"], values["empty_captions"]) == (5, 1)
    again = prepare(data, tmp_path / "out")
    assert again.code == 3
    assert "the copy was already complete" in again.err


def test_the_manifest_describes_the_copy(tmp_path: Path) -> None:
    data = hostile(tmp_path / "in")
    prepare(data, tmp_path / "out", "--shard-size", 2, "--seed", 7)
    values = manifest(tmp_path / "out")
    assert values["state"] == "finished"
    assert values["source"]["data"] == [str(data)]
    assert values["settings"] | {"edge": 256, "format": "jpeg", "quality": 95, "shard_size": 2} == values["settings"]
    train = values["splits"]["train"]
    assert (train["images"], train["rows"], train["captions"]) == (7, 2, 3)
    assert [shard["rows"] for shard in train["shards"]] == [1, 0, 1, 0]
    for shard in train["shards"]:
        content = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (shard["sha256"], shard["bytes"])


def test_broken_images_alone_are_an_error_until_they_are_repaired(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_text("nothing")
    data = annotate(folder / "c.jsonl", {"a.png": ["a"], "b.png": ["b"]})
    ran = prepare(data, tmp_path / "out")
    assert ran.code == 1
    assert "none of 2 images" in ran.err
    assert "a.png" in ran.err
    assert [row["file_name"] for row in failures(tmp_path / "out")] == ["a.png", "b.png"]
    paint(folder, "a.png", "b.png")
    assert prepare(data, tmp_path / "out").code == 0
    assert list(stored(tmp_path / "out")) == ["a.png", "b.png"]
    assert not (tmp_path / "out" / "failures.jsonl").exists()


def test_wrong_usage_writes_nothing(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 1)
    out = tmp_path / "out"
    for arguments in (
        ("--edge", 0),
        ("--quality", 101),
        ("--quality", 50, "--format", "png"),
        ("--url-column", "u", "--image-root", "x"),
        ("--shard-size", 0),
        ("--data", tmp_path / "nothing"),
    ):
        assert prepare(data, out, *arguments).code == 2, arguments
    assert call("prepare", "--out", out).code == 2
    assert call("prepare", "--data", data).code == 2
    assert not out.exists()


# Resuming


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_run_that_is_killed_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 120)
    (tmp_path / "in" / "photo 33.png").write_text("broken")
    arguments = ("prepare", "--data", data, "--shard-size", 5, "--val-fraction", 0.2)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(*arguments, "--out", whole, "--workers", 0).code == 3
    draw = random.Random(3)
    finished: dict[Path, int] = {}
    for _ in range(3):
        process, before = spawn(*arguments, "--out", out, "--workers", 1), len(finished)
        wait_until(lambda before=before: len(finished_shards(out)) > before, process)
        time.sleep(draw.uniform(0, 0.015))
        kill(process)
        for path, inode in finished.items():
            assert path.stat().st_ino == inode, "a finished shard was written again"
        finished = {path: path.stat().st_ino for path in finished_shards(out)}
    assert not (out / "dataset_dict.json").exists()
    assert call(*arguments, "--out", out, "--workers", 0).code == 3
    for path, inode in finished.items():
        assert path.stat().st_ino == inode
    assert tree(out) == tree(whole)


def arrows(out: Path) -> list[Path]:
    return sorted(out.glob("*/data-*.arrow"))


def finished_shards(out: Path) -> list[Path]:
    """The shards that have a note, while the run is not finished."""
    notes = {path.stem for path in out.glob("unfinished/*.json")}
    return [path for path in arrows(out) if f"{path.parent.name}-{path.name.split('-')[1]}" in notes]


@pytest.mark.parametrize(
    "damaged", ["train/data-00001-of-00003.arrow", "unfinished/train-00001.json", "train/state.json"]
)
def test_a_damaged_or_missing_file_is_written_again(damaged: str, tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 9)
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare(data, whole, "--shard-size", 3)
    prepare(data, out, "--shard-size", 3)
    values = manifest(out)
    (out / "manifest.json").write_text(json.dumps(values | {"state": "unfinished"}))
    notes = out / "unfinished"
    notes.mkdir()
    for number, shard in enumerate(values["splits"]["train"]["shards"]):
        note = {"rows": 3, "captions": 6, "bytes": shard["bytes"], "sha256": shard["sha256"], "failures": []}
        note |= {"failed": [], "again": bool(number)}
        (notes / f"train-{number:05d}.json").write_text(json.dumps(note))
    path = out / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (notes / "train-00002.arrow").write_bytes(b"half a shard")
    (notes / "train-00002.json.tmp").write_bytes(b"{")
    assert prepare(data, out, "--shard-size", 3).code == 0
    assert tree(out) == tree(whole)


@pytest.mark.parametrize(
    "link",
    ["manifest.json.tmp", "unfinished/train-00000.part", "unfinished/train-00000.arrow", "unfinished/train-00000.json"],
)
def test_a_link_in_a_new_folder_is_not_followed(tmp_path: Path, link: str) -> None:
    data, out, victim = photos(tmp_path / "in", 3), tmp_path / "out", tmp_path / "victim"
    victim.write_text("precious")
    (out / "unfinished").mkdir(parents=True)
    (out / link).symlink_to(victim)
    assert prepare(data, out).code == 0
    assert victim.read_text() == "precious"


def test_a_linked_work_folder_is_refused(tmp_path: Path) -> None:
    data, out, mine = photos(tmp_path / "in", 3), tmp_path / "out", tmp_path / "mine"
    (mine / "downloads").mkdir(parents=True)
    (mine / "downloads" / "7").write_text("precious")
    out.mkdir()
    (out / "unfinished").symlink_to(mine)
    refused = prepare(data, out)
    assert refused.code == 2
    assert "is a link, which is not followed" in refused.err
    assert (mine / "downloads" / "7").read_text() == "precious"


def test_a_missing_shard_of_a_finished_copy_is_written_again(tmp_path: Path) -> None:
    data, out = photos(tmp_path / "in", 6), tmp_path / "out"
    (tmp_path / "in" / "photo 0.png").write_text("broken")
    prepare(data, out, "--shard-size", 2)
    whole, inodes = tree(out), [path.stat().st_ino for path in arrows(out)]
    arrows(out)[1].unlink()
    ran = prepare(data, out, "--shard-size", 2)
    assert ran.code == 3
    assert "data-00001-of-00003.arrow" in ran.err
    assert tree(out) == whole
    assert [path.stat().st_ino == inode for path, inode in zip(arrows(out), inodes, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ("damaged", "change"),
    [
        ("train/data-00000-of-00002.arrow", "byte"),
        ("train/state.json", "missing"),
        ("train/dataset_info.json", "byte"),
        ("dataset_dict.json", "missing"),
        ("dataset_dict.json", "empty"),
    ],
)
@pytest.mark.parametrize("version", ["this", "earlier"])
def test_a_file_of_a_finished_copy_that_was_changed_is_written_again(
    damaged: str, change: str, version: str, tmp_path: Path
) -> None:
    data, out = photos(tmp_path / "in", 4), tmp_path / "out"
    prepare(data, out, "--shard-size", 2)
    whole, path = tree(out), out / damaged
    del whole["manifest.json"]
    if version == "earlier":  # which recorded no hashes of the JSON files
        values = manifest(out)
        del values["descriptions"]
        (out / "manifest.json").write_text(json.dumps(values))
    if change == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes() if change == "byte" else b"")
        content[-100:-99] = b"~"
        path.write_bytes(content)
    ran = prepare(data, out, "--shard-size", 2)
    assert ran.code == 0, ran.err
    if (version, change) == ("earlier", "byte") and damaged.endswith("json"):
        return  # only its syntax is checked
    assert f"{damaged} is missing or damaged" in ran.err
    assert {name: digest for name, digest in tree(out).items() if name in whole} == whole
    assert "already complete" in prepare(data, out, "--shard-size", 2).err


def test_shards_of_a_complete_copy_are_not_read_again(tmp_path: Path) -> None:
    data, out = photos(tmp_path / "in", 4), tmp_path / "out"
    prepare(data, out, "--shard-size", 2)
    for path in arrows(out):  # at equal time and size a change is not noticed
        before = path.stat()
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "already complete" in prepare(data, out, "--shard-size", 2).err


# Retrying


def repair(folder: Path, name: str) -> None:
    """Replaces a broken image by the one that `photos` paints."""
    number = int(name.split()[1].split(".")[0])
    scratch = folder.parent / "repair"
    paint(scratch, *(f"photo {n}.png" for n in range(number + 1)))
    shutil.copy(scratch / name, folder / name)


def test_retry_failed_tries_failures_again(tmp_path: Path) -> None:
    data, out = photos(tmp_path / "in", 12), tmp_path / "out"
    arguments = ("--shard-size", 4, "--val-fraction", 0.3)
    assert prepare(data, tmp_path / "whole", *arguments).code == 0
    assert prepare(data, tmp_path / "whole", *arguments, "--retry-failed").code == 0
    (tmp_path / "in" / "photo 1.png").write_text("broken")
    (tmp_path / "in" / "photo 6.png").unlink()
    (tmp_path / "in" / "photo 10.png").write_text("broken")
    assert prepare(data, out, *arguments).code == 3
    assert [row["error"] for row in failures(out)].count("missing") == 1
    before = tree(out)
    assert prepare(data, out, *arguments, "--retry-failed").code == 3
    assert tree(out) == before
    repair(tmp_path / "in", "photo 1.png")
    repair(tmp_path / "in", "photo 6.png")
    plain = prepare(data, out, *arguments)
    assert plain.code == 3
    assert "--retry-failed" in plain.err
    assert tree(out) == before
    assert prepare(data, out, *arguments, "--retry-failed").code == 3
    assert [row["file_name"] for row in failures(out)] == ["photo 10.png"]
    repair(tmp_path / "in", "photo 10.png")
    assert prepare(data, out, *arguments, "--retry-failed").code == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_a_retry_that_is_killed_resumes(tmp_path: Path) -> None:
    data, out = photos(tmp_path / "in", 60), tmp_path / "out"
    arguments = ("prepare", "--data", data, "--shard-size", 20)
    here = ("--workers", 0)
    assert call(*arguments, *here, "--out", tmp_path / "whole").code == 0
    broken = [f"photo {number}.png" for number in range(60) if number % 3]
    for name in broken:
        (tmp_path / "in" / name).write_text("broken")
    assert call(*arguments, *here, "--out", out).code == 3
    paint(tmp_path / "in", *(f"photo {number}.png" for number in range(60)))
    process = spawn(*arguments, "--out", out, "--retry-failed", "--workers", 1)
    wait_until(lambda: any(path.stat().st_size for path in out.glob("unfinished/*.part")), process)
    kill(process)
    assert set(datasets.load_from_disk(str(out))["train"]["file_name"]) >= {f"photo {n}.png" for n in range(0, 60, 3)}
    assert call(*arguments, *here, "--out", out).code == 0  # resumes the retry
    assert tree(out) == tree(tmp_path / "whole")


def start_and_kill(*arguments: object, out: Path, shard: int = 0, size: int = 9000) -> Path:
    """Kills a run when the log of a shard has so many bytes; the path of the log."""
    process = spawn(*arguments, "--out", out, "--workers", 1)
    log = out / "unfinished" / f"train-{shard:05d}.part"
    wait_until(lambda: log.exists() and log.stat().st_size > size, process)
    kill(process)
    assert manifest(out)["state"] == "unfinished"
    return log


def test_retry_failed_works_on_an_unfinished_copy(tmp_path: Path) -> None:
    data, out = photos(tmp_path / "in", 150), tmp_path / "out"
    arguments = ("prepare", "--data", data, "--shard-size", 50)
    assert call(*arguments, "--workers", 0, "--out", tmp_path / "whole").code == 0
    for number in (5, 20, 51):
        (tmp_path / "in" / f"photo {number}.png").write_text("broken")
    start_and_kill(*arguments, out=out, shard=1)
    paint(tmp_path / "in", *(f"photo {number}.png" for number in range(52)))
    assert call(*arguments, "--workers", 0, "--out", out, "--retry-failed").code == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_a_damaged_log_loses_only_its_tail(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 40)
    (tmp_path / "in" / "photo 2.png").write_text("broken")
    arguments = ("prepare", "--data", data, "--shard-size", 40)
    assert call(*arguments, "--workers", 0, "--out", tmp_path / "whole").code == 3
    log = start_and_kill(*arguments, out=tmp_path / "killed")
    (tmp_path / "in" / "photo 0.png").unlink()  # its result is in the log
    shard = "train/data-00000-of-00001.arrow"
    for lost in (0, 1, 30, 90):
        out = tmp_path / f"lost {lost}"
        shutil.copytree(tmp_path / "killed", out)
        os.truncate(out / log.relative_to(tmp_path / "killed"), log.stat().st_size - lost)
        assert call(*arguments, "--workers", 0, "--out", out).code == 3
        assert tree(out)[shard] == tree(tmp_path / "whole")[shard]


def test_an_interrupt_keeps_finished_images(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 200)
    arguments = ("prepare", "--data", data, "--shard-size", 100)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(*arguments, "--out", whole, "--workers", 0).code == 0
    process = spawn(*arguments, "--out", out, "--workers", 1)
    log = out / "unfinished" / "train-00000.part"
    wait_until(lambda: log.exists() and log.stat().st_size > 9000, process)
    process.send_signal(signal.SIGINT)
    ran = ended(process)
    assert ran.code == 130
    assert "run the same command again" in ran.err
    assert "Traceback" not in ran.err
    kept = int(ran.err.split(" of 200 images")[0].split()[-1])
    assert 2 < kept < 200
    assert sum(path.read_bytes().count(b'{"position"') for path in out.glob("unfinished/*.part")) == kept % 100
    assert not list((out / "unfinished").glob("*.arrow"))
    assert call(*arguments, "--out", out, "--workers", 0).code == 0
    assert tree(out) == tree(whole)


def test_other_settings_and_other_data_are_refused(tmp_path: Path) -> None:
    data, out = photos(tmp_path / "in", 5), tmp_path / "out"
    assert prepare(data, out, "--shard-size", 2).code == 0
    before = tree(out)
    other = prepare(data, out, "--shard-size", 2, "--edge", 20)
    assert other.code == 2
    assert "edge was 256, is now 20" in other.err
    assert "--overwrite" in other.err
    assert "val had 0 images, now 1" in prepare(data, out, "--shard-size", 2, "--val-fraction", 0.2).err
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[:3], lines[3].replace("a blur", "a shape"), *lines[4:]]))
    changed = prepare(data, out, "--shard-size", 2)
    assert changed.code == 2
    assert "images 3 to 4" in changed.err
    assert tree(out) == before
    (out / "failures.jsonl").write_text("old")
    assert prepare(data, out, "--shard-size", 5, "--overwrite").code == 0
    prepare(data, tmp_path / "fresh", "--shard-size", 5)
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize("manifest_there", [False, True])
def test_a_folder_with_other_files_is_not_changed(manifest_there: bool, tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    if manifest_there:
        (out / "manifest.json").write_text('{"name": "a web app"}')
    before = tree(out)
    for arguments in ((), ("--overwrite",)):
        assert prepare(data, out, *arguments).code == 2
        assert tree(out) == before
    (tmp_path / "file").write_text("x")
    assert prepare(data, tmp_path / "file").code == 2


def test_overwriting_removes_only_files_of_the_copy(tmp_path: Path) -> None:
    data, out = photos(tmp_path / "in", 2), tmp_path / "out"
    prepare(data, out)
    (out / "notes.txt").write_text("mine")
    assert prepare(data, out, "--overwrite", "--edge", 20).code == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_overwriting_leaves_what_others_put_among_the_shards(tmp_path: Path) -> None:
    data, out = photos(tmp_path / "in", 2), tmp_path / "out"
    prepare(data, out)
    others = [out / "train" / "notes.txt", out / "unfinished" / "mine.json", out / "val" / "data.csv"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert prepare(data, out, "--overwrite", "--edge", 20).code == 0
    assert [path.read_text() for path in others] == ["mine"] * 3


@pytest.mark.parametrize("way", ["itself", "link", "split", "shards linked", "failures", "val-data"])
def test_data_that_is_read_is_not_overwritten(way: str, tmp_path: Path) -> None:
    data, out = photos(tmp_path / "in", 6), tmp_path / "out"
    (tmp_path / "in" / "photo 0.png").write_text("broken")
    assert prepare(data, out, "--val-fraction", 0.3).code == 3
    before = tree(out)
    link = tmp_path / "link"
    if way == "shards linked":
        link.mkdir()
        for path in (out / "val").iterdir():
            (link / path.name).symlink_to(path)
    else:
        link.symlink_to(out)
    read = {"link": link, "split": link / "val", "shards linked": link, "failures": out / "failures.jsonl"}.get(
        way, out
    )
    if way == "failures":
        (out / "failures.jsonl").write_text('{"file_name": "../in/photo 1.png", "text": "x"}\n')
        before = tree(out)
    given = ("--val-data", out / "val", "--data", data) if way == "val-data" else ("--data", read)
    for more in ((), ("--overwrite",)):
        ran = call("prepare", *given, "--out", out, "--workers", 0, *more)
        assert ran.code == 2, ran.err
        assert "another --out" in ran.err
        assert tree(out) == before


def test_nothing_is_overwritten_for_images_that_cannot_be_read(tmp_path: Path) -> None:
    data, out = photos(tmp_path / "in", 3), tmp_path / "out"
    prepare(data, out)
    before = tree(out)
    for number in range(3):
        (tmp_path / "in" / f"photo {number}.png").write_text("broken")
    ran = prepare(data, out, "--overwrite")
    assert ran.code == 1
    assert "is not changed" in ran.err
    assert tree(out) == before


def test_an_empty_caption_leaves_the_image(tmp_path: Path) -> None:
    paint(tmp_path / "in", "a.png")
    ran = prepare(annotate(tmp_path / "in" / "c.jsonl", {"a.png": ["x", " "]}), tmp_path / "out")
    assert ran.code == 0
    assert "1 empty caption left out" in ran.err


def test_a_row_that_cannot_be_read_is_reported_listed_and_left_out(tmp_path: Path) -> None:
    paint(tmp_path / "in", "a.png", "b.png")
    data = annotate(tmp_path / "in" / "c.jsonl", {"a.png": ["x", " "], "b.png": ["y"]})
    good = data.read_text().splitlines()
    data.write_text("\n".join([good[0], '{"file_name": "a.png", "capt', "[1]", good[1]]))
    ran = prepare(data, tmp_path / "out")
    assert ran.code == 3
    assert f"2 rows of {data} cannot be read: skipped; the first: {data}: line 2, column " in ran.err
    assert "2 images, 2 captions" in ran.err
    assert "1 empty caption and 2 unreadable rows left out" in ran.err
    rows = [row for row in failures(tmp_path / "out") if row["error"] == "unreadable-row"]
    assert [row["file_name"] for row in rows] == [str(data)] * 2
    assert rows[1]["message"] == "line 3 is not an object, but a list of int"
    assert list(stored(tmp_path / "out")) == ["a.png", "b.png"]
    again = prepare(data, tmp_path / "out")
    assert (again.code, "2 unreadable rows left out" in again.err) == (3, True)
    data.write_text("\n".join([*good, ""]))
    assert prepare(data, tmp_path / "new").code == 0
    data.write_text(good[0][:-9])
    ran = prepare(data, tmp_path / "none")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert f"{data}: line 1" in ran.err


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 30)
    ran = shell('ulimit -f 24; capcli prepare --data "$DATA" --out "$OUT" --workers 1', DATA=data, OUT=tmp_path / "out")
    assert ran.code == 1
    assert "cannot write to" in ran.err
    assert "Traceback" not in ran.err
    assert not arrows(tmp_path / "out")
    assert prepare(data, tmp_path / "out").code == 0


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 1)
    script = (
        "import sys; sys.modules['datasets'] = None; from capcli.cli import main; "
        f"sys.argv = ['capcli', 'prepare', '--data', {str(data)!r}, '--out', {str(tmp_path / 'out')!r}]; main()"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "pip install 'capcli[train]'" in ran.stderr
    assert "Traceback" not in ran.stderr


# Reading


@given(st.builds(Stored, st.text(st.characters()), st.integers(0), st.text()))
def test_an_address_of_a_dataset_row_is_text_that_leads_to_the_row(row: Stored) -> None:
    images = StoredImages()
    with mock.patch.object(images, "read", side_effect=lambda found: repr(found).encode()):
        address = address_of(row)
        assert images.find(os.fsdecode(os.fsencode(address))) == repr(row).encode()


def test_other_addresses() -> None:
    assert StoredImages().find(address_of("a [0].png")) == "a [0].png"
    with pytest.raises(ImageError, match="why\n") as caught:
        StoredImages().find(address_of(ImageError("kind", "why\n")))
    assert caught.value.kind == "kind"
    for damaged in ("\0", "\0[1]", "\0a.png"):
        with pytest.raises(ImageError, match="NUL"):
            StoredImages().find(damaged)


def test_a_path_through_a_link_is_opened_as_it_is(tmp_path: Path) -> None:
    paint(tmp_path / "real", "a.png")
    (tmp_path / "real" / "annotations").mkdir()
    annotate(tmp_path / "real" / "annotations" / "c.jsonl", {"../a.png": ["x"]})
    (tmp_path / "link").symlink_to(tmp_path / "real" / "annotations")
    assert prepare(tmp_path / "link" / "c.jsonl", tmp_path / "out").code == 0
    assert list(stored(tmp_path / "out")) == ["../a.png"]


def a_dataset(folder: Path, count: int = 12) -> tuple[list[Path], datasets.Dataset]:
    names = [f"{number}.png" for number in range(count)]
    paint(folder, *names)
    paths = [folder / name for name in names]
    dataset = datasets.Dataset.from_dict({"number": range(count), "image": [str(path) for path in paths]})
    return paths, dataset.cast_column("image", datasets.Image())


@pytest.mark.parametrize("kind", ["whole", "sharded", "shuffled", "selected"])
def test_any_dataset_on_disk_is_read(kind: str, tmp_path: Path) -> None:
    paths, dataset = a_dataset(tmp_path / "in")
    order = list(range(len(paths)))
    if kind == "selected":
        order = [7, 7, 2, 11]
        dataset = dataset.select(order)
    if kind == "shuffled":
        dataset = dataset.shuffle(seed=1)
        order = dataset["number"][:]
    dataset.save_to_disk(str(tmp_path / "set"), num_shards=3 if kind == "sharded" else 1)
    images = StoredImages()
    read = [images.read(Stored(str(tmp_path / "set"), row)) for row in range(len(order))]
    assert read == [paths[number].read_bytes() for number in order]
    for row in (-1, len(order), 10**6):
        with pytest.raises(ImageError, match="no row"):
            images.read(Stored(str(tmp_path / "set"), row))


def test_a_file_of_indices_is_applied(tmp_path: Path) -> None:
    """Older versions of datasets saved a shuffled dataset so."""
    import pyarrow as pa

    paths, dataset = a_dataset(tmp_path / "in")
    dataset.save_to_disk(str(tmp_path / "set"))
    order = [5, 0, 11, 3]
    table = pa.table({"indices": pa.array(order, pa.uint64())})
    with pa.ipc.new_stream(str(tmp_path / "set" / "indices.arrow"), table.schema) as stream:
        stream.write_table(table)
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    (tmp_path / "set" / "state.json").write_text(
        json.dumps(state | {"_indices_files": [{"filename": "indices.arrow"}]})
    )
    images = StoredImages()
    assert [images.read(Stored(str(tmp_path / "set"), row)) for row in range(4)] == [
        paths[n].read_bytes() for n in order
    ]


def test_columns_of_bytes_and_of_paths_are_read(tmp_path: Path) -> None:
    paint(tmp_path, "a.png")
    content, gone = (tmp_path / "a.png").read_bytes(), str(tmp_path / "gone.png")
    columns = {
        "raw": [content, None],
        "path": [str(tmp_path / "a.png"), gone],
        "link": ["https://example.org/a.png", ""],
        "both": [{"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": None, "path": None}],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "set"))
    images = StoredImages()
    for column in ("raw", "path", "both"):
        assert images.read(Stored(str(tmp_path / "set"), 0, column)) == content
        with pytest.raises(ImageError):
            images.read(Stored(str(tmp_path / "set"), 1, column))
    with pytest.raises(ImageError, match="address"):
        images.read(Stored(str(tmp_path / "set"), 0, "link"))


def test_a_folder_that_is_not_a_dataset_is_an_error(tmp_path: Path) -> None:
    _, dataset = a_dataset(tmp_path / "in", 3)
    folder = tmp_path / "set"
    dataset.save_to_disk(str(folder))
    with pytest.raises(CapcliError, match="no column 'picture'"):
        StoredImages().read(Stored(str(folder), 0, "picture"))
    with pytest.raises(CapcliError, match="nowhere"):
        StoredImages().read(Stored(str(tmp_path / "nowhere"), 0))
    data = next(folder.glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CapcliError, match="not a dataset on disk"):
        StoredImages().read(Stored(str(folder), 0))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_processes_read_concurrently(method: str, tmp_path: Path) -> None:
    paths, dataset = a_dataset(tmp_path / "in")
    dataset.save_to_disk(str(tmp_path / "set"), num_shards=2)
    rows = [Stored(str(tmp_path / "set"), row) for row in range(len(paths))]
    images = StoredImages()
    expected = [images.read(row) for row in rows]  # opened here first, as a forked process finds it
    assert expected == [path.read_bytes() for path in paths]
    assert len(pickle.dumps(images)) < 200
    with get_context(method).Pool(2) as pool:
        assert pool.map(images.read, rows * 3, chunksize=3) == expected * 3


def test_a_dataset_may_be_moved_between_runs(tmp_path: Path) -> None:
    data = photos(tmp_path / "in", 4)
    prepare(data, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    row = Stored(str(tmp_path / "moved" / "train"), 3)
    assert Image.open(io.BytesIO(StoredImages().read(row))).size


def test_images_of_one_name_in_two_folders_are_two_images(tmp_path: Path) -> None:
    for split, text in (("train", "a red house"), ("val", "two blue cars")):
        paint(tmp_path / split, "1.png", seed=len(split))
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": text}) + "\n")
    out = tmp_path / "prepared"
    ran = call("prepare", "--data", tmp_path / "train", "--val-data", tmp_path / "val", "--out", out, "--workers", 0)
    assert ran.code == 0, ran.err
    split = read_split(DataOptions(data=(str(out),)))
    assert [each.captions for each in split.train] == [("a red house",)]
    assert [each.captions for each in split.val] == [("two blue cars",)]
