"""Images with captions, read from every format that is known."""

from __future__ import annotations

import base64
import contextlib
import csv
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import paint

from capcli.annotations import DataReport, read_annotations
from capcli.annotations.dataset_reading import garbage_collection_paused
from capcli.errors import CapcliError, UsageError
from capcli.options import DataOptions
from capcli.records import Annotated, Stored
from capcli.text import MISSING_TEXTS, clean

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
TWO = {"a.jpg": ("A dog.", "A brown dog."), "b.png": ("Two cats.",)}


def read(*paths: Path, report: DataReport | None = None, locate: bool = True, **options: Any) -> list[Annotated]:
    wanted = DataOptions(**options)
    names = [os.fspath(path) for path in paths]
    return list(read_annotations(names, wanted, locate=locate, report=DataReport() if report is None else report))


def captions_by_name(images: list[Annotated]) -> dict[str, tuple[str, ...]]:
    return {image.name: image.captions for image in images}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return paint(tmp_path, *TWO)


def write(path: Path, content: str | bytes | object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


COCO = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.png"}],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": "Two cats."},
        {"id": 2, "image_id": 7, "caption": " A dog.\n"},
        {"id": 3, "image_id": 7, "caption": "A brown dog."},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "a.jpg", "split": "restval", "sentences": [{"raw": "A dog."}, {"raw": "A brown dog."}]},
        {"filename": "b.png", "split": "val", "sentences": [{"raw": "Two cats.", "tokens": ["two", "cats"]}]},
    ],
    "dataset": "flickr8k",
}
LINES = (
    '{"file_name": "a.jpg", "text": "A dog.", "score": -0.4, "candidates": [{"text": "A dog.", "score": -0.4}, '
    '{"text": "A brown dog.", "score": -0.5}]}\n\n{"image": "b.png", "caption": "Two cats."}'
)
FILES: dict[str, str | bytes | object] = {
    "captions.txt": "image,caption\na.jpg,A dog.\na.jpg,A brown dog.\nb.png,Two cats.\n",
    "mark.csv": "\ufeffimage,caption\r\na.jpg,A dog.\r\nb.png,Two cats.\r\na.jpg,A brown dog.\r\n",
    "utf16.csv": "image,caption\na.jpg,A dog.\nb.png,Two cats.\na.jpg,A brown dog.\n".encode("utf-16"),
    "old-mac.csv": "image,caption\ra.jpg,A dog.\rb.png,Two cats.\ra.jpg,A brown dog.\r",
    "columns.csv": 'number,Caption ,File_Name\n1,A dog.,a.jpg\n2,"A brown dog.",a.jpg\n3,Two cats.,b.png\n',
    "table.tsv": "caption\timage_path\nA dog.\ta.jpg\nTwo cats.\tb.png\nA brown dog.\t./a.jpg\n",
    "semicolons.csv": "image;text\na.jpg;A dog.\na.jpg;A brown dog.\nb.png;Two cats.\n",
    "results.csv": "image_name| comment_number| comment\na.jpg| 0| A dog.\na.jpg| 1| A brown dog.\nb.png| 0| Two cats.\n",
    "spaced.csv": 'image, caption\na.jpg, A dog.\na.jpg, "A brown dog."\nb.png, Two cats.\n',
    "lists.csv": 'filename,captions\na.jpg,"[""A dog."", ""A brown dog.""]"\nb.png,"[""Two cats.""]"\n',
    "bare.tsv": "a.jpg\tA dog.\na.jpg\tA brown dog.\nb.png\tTwo cats.\n",
    "Flickr8k.token.txt": "a.jpg#0\tA dog.\na.jpg#1\tA brown dog.\nb.png#0\tTwo cats.\n",
    "captions.zh.txt": "a.jpg#zhc#0 A dog.\nb.png#zhc#0 Two cats.\na.jpg#zhc#1 A brown dog.\n",
    "coco.json": COCO,
    "coco-pretty.json": json.dumps(COCO, indent=2),
    "dataset_flickr8k.json": KARPATHY,
    "captions.jsonl": LINES,
    "one-object.jsonl": '{"file_name": "a.jpg", "captions": ["A dog.", "A brown dog."]}\n'
    '{"file_name": "b.png", "text": "Two cats."}',
    "list.json": [
        {"image": "a.jpg", "captions": ["A dog.", "A brown dog."]},
        {"image": "b.png", "caption": "Two cats."},
    ],
    "by-name.json": {"a.jpg": ["A dog.", "A brown dog."], "b.png": "Two cats."},
    "kohya.json": {"a": {"caption": ["A dog.", "A brown dog."], "tags": "x"}, "b": {"caption": "Two cats."}},
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_format_gives_the_same_captions(photos: Path, name: str) -> None:
    report = DataReport()
    images = read(write(photos / name, FILES[name]), report=report)
    assert {os.path.basename(str(image.image)): image.captions for image in images} == TWO
    assert all(Path(str(image.image)).samefile(photos / os.path.basename(str(image.image))) for image in images)
    assert (report.images, report.captions, report.failures, report.notes) == (2, 3, [], [])
    assert report.line() == "2 images, 3 captions"


@pytest.mark.parametrize("name", FILES)
def test_references_need_no_images(tmp_path: Path, name: str) -> None:
    images = read(write(tmp_path / name, FILES[name]), locate=False)
    stem = name == "kohya.json"
    assert captions_by_name(images) == {os.path.splitext(key)[0] if stem else key: value for key, value in TWO.items()}
    assert {image.image for image in images} == {None}


def test_images_come_in_the_order_of_their_first_row(photos: Path) -> None:
    table = write(photos / "t.csv", "image,caption\nb.png,1\na.jpg,2\nb.png,3\n")
    assert [(image.name, image.captions) for image in read(table)] == [("b.png", ("1", "3")), ("a.jpg", ("2",))]


def test_the_named_columns_are_read(photos: Path) -> None:
    table = write(photos / "t.csv", "image,photo,caption,said,part\nx,a.jpg,no,yes,dev\nx,b.png,no,yes,TEST\n")
    images = read(table, image_column="photo", caption_column="Said", split_column="part")
    assert [(image.name, image.captions, image.split) for image in images] == [
        ("a.jpg", ("yes",), "val"),
        ("b.png", ("yes",), "test"),
    ]


def test_columns_of_a_table_without_header_are_given_by_number(photos: Path) -> None:
    table = write(photos / "t.tsv", "A dog\t7\ta.jpg\nA cat\t8\tb.png\n")
    assert captions_by_name(read(table, image_column="3", caption_column="1")) == {
        "a.jpg": ("A dog",),
        "b.png": ("A cat",),
    }


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        ({"image_column": "foto"}, UsageError, ("t.csv", "'foto'", "picture, words")),
        ({"caption_column": "x", "image_column": "picture"}, UsageError, ("'x'", "picture, words")),
        ({}, CapcliError, ("image's name", "--image-column", "picture, words")),
        ({"image_column": "picture"}, CapcliError, ("caption", "--caption-column", "picture, words")),
        (
            {"image_column": "picture", "caption_column": "words", "split_column": "s"},
            UsageError,
            ("'s'", "picture, words"),
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_missing_column_is_an_error_that_lists_the_columns(
    photos: Path, options: dict[str, str], kind: type[CapcliError], parts: tuple[str, ...], suffix: str
) -> None:
    table = photos / f"t.{suffix}"
    if suffix == "csv":
        write(table, "picture,words\na.jpg,A dog\n")
    elif suffix == "jsonl":
        write(table, '{"picture": "a.jpg", "words": "A dog"}\n{"picture": "b.png", "words": "A cat"}\n')
    else:
        parquet(table, {"picture": ["a.jpg"], "words": ["A dog"]})
    with pytest.raises(CapcliError) as caught:
        read(table, **options)
    assert type(caught.value) is kind
    for part in (*parts, table.name):
        assert part.replace("t.csv", table.name) in str(caught.value)


def test_captions_are_stripped_and_put_on_one_line(photos: Path) -> None:
    odd = "  Zwei  Hunde,\t„los“ \r\n und\u2028weg 🐕 \u00a0"
    table = write(photos / "t.jsonl", json.dumps({"file_name": "a.jpg", "text": odd}))
    assert captions_by_name(read(table)) == {"a.jpg": ("Zwei  Hunde,\t„los“   und weg 🐕",)}


def test_cells_with_separators_quotes_and_breaks(photos: Path) -> None:
    table = write(
        photos / "t.csv",
        'image,caption\na.jpg,one, two , three\na.jpg,"one, ""two"""\na.jpg,5" and 6" boards\na.jpg,"up\ndown"\n'
        'b.png,"A ""dog"", red",\n',
    )
    assert captions_by_name(read(table)) == {
        "a.jpg": ("one, two , three", 'one, "two"', '5" and 6" boards', "up down"),
        "b.png": ('A "dog", red',),
    }


def test_empty_captions_are_left_out_and_listed(photos: Path) -> None:
    rows: list[dict[str, object]] = [
        {"file_name": "a.jpg", "captions": ["A dog.", "", None, " \n\u00a0", 12, float("nan"), 1.5]},
        {"file_name": "b.png", "text": None},
        {"file_name": "c.jpg", "error": "missing", "message": "there is no such file"},
        {"file_name": "d.jpg", "captions": []},
        {"file_name": "e.jpg", "text": "not there"},
    ]
    table = write(photos / "t.jsonl", "\n".join(map(json.dumps, rows)))
    report = DataReport()
    assert captions_by_name(read(table, report=report)) == {"a.jpg": ("A dog.", "12", "1.5")}
    assert [(failure.name, failure.error) for failure in report.failures] == [
        *[("a.jpg", "empty-caption")] * 4,
        ("b.png", "empty-caption"),
        ("c.jpg", "no-caption"),
        ("d.jpg", "no-caption"),
        ("e.jpg", "missing"),
    ]
    assert (report.images, report.captions, report.missing, report.broken) == (1, 3, 1, 0)
    assert report.line() == "1 image, 3 captions; left out: 1 missing, 5 empty captions, 2 images without a caption"
    report.write(str(photos / "data.failures.jsonl"))
    listed = [json.loads(line) for line in (photos / "data.failures.jsonl").read_text().splitlines()]
    assert [set(row) for row in listed] == [{"file_name", "error", "message"}] * 8
    assert report.line().endswith(f"caption ({photos}/data.failures.jsonl)")
    DataReport().write(str(photos / "data.failures.jsonl"))
    assert not (photos / "data.failures.jsonl").exists()


def test_the_broken_row_of_flickr30k_is_an_empty_caption(photos: Path) -> None:
    table = write(photos / "t.csv", "image_name| comment_number| comment\na.jpg| 3| A dog .\na.jpg| 4   A dog runs .\n")
    report = DataReport()
    assert captions_by_name(read(table, report=report)) == {"a.jpg": ("A dog .",)}
    assert report.empty_captions == 1


def test_a_caption_repeated_within_one_file_is_kept_twice(photos: Path) -> None:
    one = write(photos / "1.csv", "image,caption\na.jpg,A dog\na.jpg,A dog\n")
    two = write(photos / "2.csv", "image,caption\n./a.jpg,A dog\na.jpg,Ein Hund\na.jpg,Ein Hund\n")
    for locate in (True, False):
        [image] = read(one, two, one, locate=locate)
        assert image.captions == ("A dog", "A dog", "Ein Hund", "Ein Hund")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("cut.json", json.dumps(COCO)[:-30], ("line 1", "truncated")),
        ("cut-pretty.json", json.dumps(COCO, indent=1)[:-30], ("line", "column", "truncated")),
        ("cut.jsonl", '{"image": "a.jpg", "text": "x', ("line 1", "truncated")),
        ("no-lines.jsonl", '{"image": \n{"image": "a.jpg\n', ("line 2", "not JSON")),
        ("wide.csv", "caption,image\nA dog, brown,a.jpg\n", ("line 2", "3 cells", "2 columns")),
        (
            "instances.json",
            {"images": COCO["images"], "annotations": [{"image_id": 3, "bbox": []}]},
            ("image_id, bbox",),
        ),
        ("info.json", {"images": COCO["images"], "info": {}}, ("without captions", "'images', 'info'")),
        ("other.json", {"a": 1}, ("'a'", "Karpathy")),
        ("numbers.json", [1, 2], ("a list of int",)),
        ("list.txt", "a.jpg\nb.png\n", ("none of the known formats", "'a.jpg'", "COCO")),
        ("empty.csv", "", ("empty",)),
        ("header.csv", "image,caption\n", ("no image", "CSV", "image, caption")),
        ("packed.csv.gz", b"\x1f\x8b\x08\0\0\0", ("gzip", "unpack")),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0", ("binary",)),
        ("name.csv", "file_name,text,file_name_bytes\nx,A dog,%%%\n", ("base64",)),
        ("split.csv", "image,caption,split\na.jpg,A dog,somewhere\n", ()),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(
    photos: Path, name: str, content: str | bytes | object, parts: tuple[str, ...]
) -> None:
    path = write(photos / name, content)
    if not parts:  # a column called split may have any values, unless the user named it
        assert read(path)[0].split is None
        parts = ("'somewhere'", "train")
    with pytest.raises(CapcliError) as caught:
        read(path, split_column="split" if name == "split.csv" else None)
    assert caught.value.exit_code == 1
    for part in (name, *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("cut.jsonl", LINES[:-8], ("1 row", "line 3", "truncated")),
        ("no-object.jsonl", '{"image": "a.jpg", "text": "x"}\n[1]\n{]\n', ("2 rows", "line 2", "not an object")),
        (
            "first.jsonl",
            '{"image": "b.png", \n{"image": "a.jpg", "text": "x"}\n',
            ("1 row", "line 1, column", "not JSON"),
        ),
        (
            "other.jsonl",
            '{"image": "a.jpg", "text": "x"}\n{"foto": "b.png", "text": "y"}\n',
            ("line 2 names no", "'foto'"),
        ),
        ("wide.csv", "caption,image\nx,a.jpg\nA dog, brown,b.png\n", ("1 row", "line 3", "3 cells", "2 columns")),
        ("token.txt", "a.jpg#0\tA dog\nA cat\n", ("1 row", "line 2", "'A cat'")),
        ("latin.csv", "image,caption\na.jpg,ok\nb.png,caf\xe9\n".encode("latin-1"), ("line 3 is not UTF-8",)),
        ("latin.txt", "a.jpg#0\tok\nb.png#0\tcaf\xe9\n".encode("latin-1"), ("line 2 is not UTF-8",)),
        (
            "latin.jsonl",
            '{"image": "a.jpg", "text": "ok"}\n{"image": "caf\xe9"}'.encode("latin-1"),
            ("line 2 is not UTF-8",),
        ),
        (
            "latin.json",
            json.dumps(COCO, indent=1).replace("cats", "c\xe9ts").encode("latin-1"),
            ("a caption of b.png is not UTF-8",),
        ),
        ("cut16.csv", "image,caption\na.jpg,A dog.\nb.png,A cat".encode("utf-16")[:-1], ("line 3 is not UTF-8",)),
        ("nul.csv", "image,caption\na.jpg,A dog\nb.png,A c\0at\n", ("line 3 has a NUL byte",)),
        ("quote.csv", 'image,caption\nb.png,"A cat\na.jpg,"A dog"\n', ("line 2 opens a quote that is never closed",)),
        ("quotes.csv", 'image,caption\nb.png,"A cat\na.jpg,A dog"\n', ("line 2 opens a quote",)),
        ("quote.tsv", '"image"\t"caption"\n"b.png"\t"A cat\n"a.jpg"\t"A dog"\n', ("line 2 opens a quote",)),
        ("name.csv", "file_name,text,file_name_bytes\na.jpg,A dog,\nx,A dog,%%%\n", ("base64",)),
        ("name.json", [{"image": "a.jpg", "text": "x"}, {"image": "sub\0x/b.png", "text": "y"}], ("NUL byte",)),
        ("mixed.json", [{"image": "a.jpg", "text": "x"}, 7], ("line 2 is not an object",)),
        (
            "coco.json",
            {"images": COCO["images"], "annotations": [{"image_id": 7, "caption": "x"}, {"caption": "y"}]},
            ("annotations[1] has no image_id",),
        ),
        (
            "null.json",
            {"images": [*COCO["images"], None], "annotations": [{"image_id": 7, "caption": "x"}]},
            ("images[2] is not an object",),
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_reported_and_skipped(
    photos: Path, name: str, content: str | bytes | object, parts: tuple[str, ...]
) -> None:
    report = DataReport()
    path = write(photos / name, content)
    assert list(captions_by_name(read(path, report=report))) == ["a.jpg"]
    [note] = report.notes
    assert note.startswith(parts[0] if "row" in parts[0] else "1 row")
    for part in (f"of {path} cannot be read: skipped; the first: {path}: ", *parts):
        assert part in note
    assert report.unread == int(note.split()[0])
    assert "that cannot be read" in report.line()


def test_a_missing_path_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.csv: no such file"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(UsageError, match="no data"):
        read()
    with pytest.raises(UsageError, match=r"--image-root .*nowhere is not a folder"):
        read(tmp_path, image_root=str(tmp_path / "nowhere"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("folder", ["images", "Flicker8k_Dataset", "../train2014", "../Images", "."])
def test_images_are_found_near_the_annotations(tmp_path: Path, folder: str) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train_thumbnails").mkdir()
    paint(tmp_path / "annotations" / folder, *TWO)
    images = read(write(tmp_path / "annotations" / "captions_train2014.json", COCO))
    assert all(os.path.isfile(str(image.image)) for image in images)
    assert captions_by_name(images) == TWO


def test_images_of_one_name_are_found_by_split_folder_and_coco_release(tmp_path: Path) -> None:
    paint(tmp_path, "train/1.jpg", "validation/1.jpg", "val/COCO_val2014_1.jpg", "val2014/COCO_val2014_1.jpg")
    table = "image,caption,split\n1.jpg,here,valid\nCOCO_val2014_1.jpg,coco,test\n"
    images = read(write(tmp_path / "t.csv", table))
    assert [os.path.relpath(str(image.image), tmp_path) for image in images] == [
        "validation/1.jpg",
        "val2014/COCO_val2014_1.jpg",
    ]
    karpathy = {"images": [{"filename": "1.jpg", "filepath": "train", "split": "val", "sentences": [{"raw": "x"}]}]}
    [image] = read(write(tmp_path / "k.json", karpathy))
    assert os.path.relpath(str(image.image), tmp_path) == "train/1.jpg"


def test_image_root_and_absolute_names(tmp_path: Path) -> None:
    paint(tmp_path / "far", "a.jpg", "sub/c d.jpg", "b.png")
    paint(tmp_path / "near", "a.jpg")
    table = write(
        tmp_path / "near" / "t.csv",
        f"image,caption\na.jpg,1\nsub\\c d.jpg,2\n{tmp_path}/near/a.jpg,3\n{tmp_path}/no.jpg,4\n",
    )
    report = DataReport()
    images = read(table, report=report, image_root=str(tmp_path / "far"))
    assert [os.path.relpath(str(image.image), tmp_path) for image in images] == [
        "far/a.jpg",
        "far/sub/c d.jpg",
        "near/a.jpg",
    ]
    assert report.missing == 1


def test_the_error_names_the_folders_that_were_searched(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    table = write(tmp_path / "t.csv", "image,caption\na.jpg,1\n")
    with pytest.raises(CapcliError) as caught:
        read(table)
    for part in ("t.csv", "CSV", "a.jpg", f"{tmp_path},", f"{tmp_path}/images", "--image-root"):
        assert part in str(caught.value)
    with pytest.raises(CapcliError, match=r"prepare --url-column"):
        read(write(tmp_path / "t.csv", "image,caption\nhttps://example.org/a.jpg,1\n"))
    with pytest.raises(CapcliError, match=r"no image has a caption.*t\.csv.*columns: image, caption"):
        read(write(tmp_path / "t.csv", "image,caption\na.jpg,\n"))


def test_urls_are_names(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", "text\timage_path\nA dog\thttps://example.org/x//a.jpg?y=1\n")
    assert captions_by_name(read(table, locate=False)) == {"https://example.org/x//a.jpg?y=1": ("A dog",)}


def test_names_may_have_any_bytes(tmp_path: Path) -> None:
    odd = [b"caf\xe9.jpg", "日本 1.jpg".encode(), b"a#b.jpg", b" lead.jpg", b'q"uo,te.jpg', b"x.jpg#0 y.png"]
    paint(tmp_path, *odd)
    rows = [
        {"file_name": name.decode("utf-8", "replace"), "text": "x", "file_name_bytes": base64.b64encode(name).decode()}
        for name in odd
    ]
    images = read(write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows))))
    assert [os.path.basename(os.fsencode(str(image.image))) for image in images] == odd
    with_tabs = "".join(f"{os.fsdecode(name)}#1\tx\n" for name in odd[1:])
    assert [image.name for image in read(write(tmp_path / "tokens", with_tabs))] == list(map(os.fsdecode, odd[1:]))
    report = DataReport()
    write(
        tmp_path / "d.jsonl",
        "\n".join(json.dumps(row | {"text": ""}) for row in rows) + '\n{"image":" lead.jpg","text":"x"}',
    )
    read(tmp_path / "d.jsonl", report=report)
    report.write(str(tmp_path / "f.jsonl"))
    first = json.loads((tmp_path / "f.jsonl").read_text().splitlines()[0])
    assert (first["file_name"], base64.b64decode(first["file_name_bytes"])) == ("caf\ufffd.jpg", odd[0])


def test_names_in_other_unicode_forms_and_without_suffix(tmp_path: Path) -> None:
    paint(tmp_path, "cafe\u0301.jpg", "0017.png", "IMG_1.JPG")
    images = read(write(tmp_path / "t.csv", "image_id,caption\ncaf\u00e9.jpg,1\n0017,2\nIMG_1.jpg,3\n"))
    assert [os.path.basename(str(image.image)) for image in images] == ["cafe\u0301.jpg", "0017.png", "IMG_1.JPG"]


def test_captions_are_read_with_the_images_of_their_run_file(tmp_path: Path) -> None:
    paint(tmp_path / "photos", *TWO)
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "captions.run.json", {"folder": str(tmp_path / "photos")})
    assert captions_by_name(read(write(tmp_path / "out" / "captions.jsonl", LINES))) == TWO


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path)
    return path


def test_parquet(photos: Path) -> None:
    table = parquet(
        photos / "t", {"id": [1, 2], "image": ["a.jpg", "b.png"], "captions": [list(TWO["a.jpg"]), ["Two cats."]]}
    )
    assert captions_by_name(read(table)) == TWO
    rows = parquet(
        photos / "u", {"image": ["a.jpg", "b.png", "a.jpg"], "caption": ["A dog.", "Two cats.", "A brown dog."]}
    )
    assert captions_by_name(read(rows)) == TWO
    inside = parquet(photos / "v", {"image": [{"bytes": b"x", "path": "z.jpg"}], "caption": ["A dog."]})
    assert captions_by_name(read(inside, locate=False)) == {"z.jpg": ("A dog.",)}
    with pytest.raises(CapcliError, match="save_to_disk"):
        read(inside)
    write(photos / "broken", b"PAR1" + b"x" * 40)
    with pytest.raises(CapcliError, match=r"cannot read .*broken"):
        read(photos / "broken")


def test_imagefolder(tmp_path: Path) -> None:
    paint(tmp_path, "train/1.jpg", "validation/1.jpg", "test/sub/1.jpg")
    for split, name in (("train", "1.jpg"), ("validation", "1.jpg"), ("test", "sub/1.jpg")):
        write(tmp_path / split / "metadata.csv", f"file_name,text\n{name},{split}\n")
    for locate in (True, False):
        assert [(image.name, image.captions, image.split) for image in read(tmp_path, locate=locate)] == [
            ("test/sub/1.jpg", ("test",), "test"),
            ("train/1.jpg", ("train",), "train"),
            ("validation/1.jpg", ("validation",), "val"),
        ]
    [image] = read(tmp_path / "train")
    assert (image.name, image.split, image.image) == ("1.jpg", None, str(tmp_path / "train" / "1.jpg"))
    top = paint(tmp_path / "top", "train/1.jpg", "val/1.jpg")
    write(top / "metadata.jsonl", '{"file_name": "train/1.jpg", "text": "x"}\n{"file_name": "val/1.jpg", "text": "y"}')
    assert [image.split for image in read(top)] == ["train", "val"]


def test_folder_of_images_with_text_files(tmp_path: Path) -> None:
    paint(tmp_path, "1_x/a.jpg", "1_x/b.png", "c d.webp", "1_x/none.jpg", "val/e.jpg")
    write(tmp_path / "1_x" / "a.txt", "A dog.\nA brown dog.\n")
    write(tmp_path / "1_x" / "b.caption", "Two cats.")
    write(tmp_path / "1_x" / "b.txt", "cats, two")
    write(tmp_path / "c d.txt", "\n")
    write(tmp_path / "val" / "e.txt", "held out")
    write(tmp_path / "notes.txt", "no image of this name")
    report = DataReport()
    images = read(tmp_path, report=report)
    assert captions_by_name(images) == {
        "1_x/a.jpg": TWO["a.jpg"],
        "1_x/b.png": TWO["b.png"],
        "val/e.jpg": ("held out",),
    }
    assert [image.split for image in images] == [None, None, "val"]
    assert {(failure.name, failure.error) for failure in report.failures} == {
        ("c d.webp", "empty-caption"),
        ("1_x/none.jpg", "no-caption"),
    }


def test_a_folder_without_annotations_is_an_error_with_what_was_looked_for(photos: Path) -> None:
    with pytest.raises(CapcliError, match=r"metadata\.jsonl.*\.txt or \.json beside them$"):
        read(photos)
    write(photos / "captions.csv", "image,caption\na.jpg,1\n")
    with pytest.raises(CapcliError, match=r"it has captions\.csv: give that file"):
        read(photos)


def saved(folder: Path, columns: dict[str, list[Any]], edit: Callable[[Any], Any] = lambda dataset: dataset) -> Any:
    import datasets

    dataset = datasets.Dataset.from_dict(columns)
    if "image" in columns:
        dataset = dataset.cast_column("image", datasets.Image())
    edit(dataset).save_to_disk(str(folder))
    return dataset


def files(folder: Path, *names: str) -> list[dict[str, Any]]:
    return [{"bytes": (folder / name).read_bytes(), "path": None} for name in names]


def test_dataset_on_disk_with_a_row_for_each_image(tmp_path: Path, photos: Path) -> None:
    import datasets

    columns = {
        "file_name": list(TWO),
        "image": files(photos, *TWO),
        "captions": list(map(list, TWO.values())),
        "width": [1, 2],
    }
    splits = {
        "train": saved(tmp_path / "lone", columns),
        "validation": saved(tmp_path / "lone", {**columns, "file_name": "xy"}),
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    images = read(tmp_path / "both")
    assert [(image.name, image.captions, image.image, image.split) for image in images] == [
        ("a.jpg", TWO["a.jpg"], Stored(str(tmp_path / "both" / "train"), 0, "image"), "train"),
        ("b.png", TWO["b.png"], Stored(str(tmp_path / "both" / "train"), 1, "image"), "train"),
        ("x", TWO["a.jpg"], Stored(str(tmp_path / "both" / "validation"), 0, "image"), "val"),
        ("y", TWO["b.png"], Stored(str(tmp_path / "both" / "validation"), 1, "image"), "val"),
    ]
    assert [image.split for image in read(tmp_path / "lone")] == [None, None]
    assert [(image.name, image.image) for image in read(tmp_path / "both", locate=False)][:1] == [("a.jpg", None)]


def test_dataset_on_disk_with_a_row_for_each_caption(tmp_path: Path, photos: Path) -> None:
    from capcli.sources.dataset_images import StoredImages

    rows = ["b.png", "a.jpg", "b.png", "a.jpg"]
    pictures = files(photos, *rows)
    for number, extra in enumerate(({"image_id": [3, 7, 3, 7]}, {}, {"path": True})):
        columns: dict[str, list[Any]] = {"image": pictures, "caption": ["1", "2", "3", "4"], **extra}
        if columns.pop("path", None):
            columns["image"] = [each | {"path": f"somewhere/{name}"} for each, name in zip(pictures, rows, strict=True)]
        saved(tmp_path / f"set{number}", columns, lambda dataset: dataset.select([3, 0, 2, 1]))
        images = read(tmp_path / f"set{number}")
        assert [image.captions for image in images] == [("4", "2"), ("1", "3")], number
        assert [StoredImages().read(image.image) for image in images if isinstance(image.image, Stored)] == [
            (photos / "a.jpg").read_bytes(),
            (photos / "b.png").read_bytes(),
        ]


def test_dataset_on_disk_with_paths_of_images(photos: Path) -> None:
    saved(photos / "set", {"image_path": ["a.jpg", "gone.jpg"], "caption": ["1", "2"]})
    report = DataReport()
    [image] = read(photos / "set", report=report)
    assert os.path.samefile(str(image.image), photos / "a.jpg")
    assert [failure.name for failure in report.failures] == ["gone.jpg"]
    report = DataReport()
    bare(photos / "paths", ["b.png", "gone.png"], [str(photos / "b.png"), str(photos / "gone.png")])
    assert [image.image for image in read(photos / "paths", report=report)] == [str(photos / "b.png")]
    assert report.missing == 1


def bare(folder: Path, captions: list[str], paths: list[str]) -> None:
    """A dataset on disk whose Image column has only paths, as older versions of datasets wrote."""
    import pyarrow

    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    image = pyarrow.array([{"bytes": None, "path": path} for path in paths], kind)
    table = pyarrow.table({"image": image, "caption": captions})
    folder.mkdir()
    with pyarrow.ipc.new_stream(str(folder / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    write(folder / "state.json", {"_data_files": [{"filename": "data.arrow"}]})


def test_a_damaged_dataset_on_disk_is_an_error(tmp_path: Path, photos: Path) -> None:
    saved(tmp_path / "set", {"image": files(photos, "a.jpg"), "words": ["1"]})
    with pytest.raises(CapcliError, match=r"--caption-column; its columns: image, words"):
        read(tmp_path / "set")
    [arrow] = (tmp_path / "set").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(CapcliError, match=r"cannot read .*\.arrow"):
        read(tmp_path / "set", caption_column="words")
    arrow.unlink()
    with pytest.raises(CapcliError, match=r"cannot read .*\.arrow"):
        read(tmp_path / "set", caption_column="words")


def test_large_tables_are_read_fast(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(500):
        (tmp_path / "images" / f"{number}.jpg").touch()
    rows = "".join(f'{number % 500}.jpg,"A dog, and number {number} ."\n' for number in range(10_000))
    table = write(tmp_path / "captions.txt", "image,caption\n" + rows)
    began = time.process_time()
    assert len(read(table)) == 500
    assert time.process_time() - began < 0.75


def test_garbage_collection_is_paused_and_then_as_before() -> None:
    assert gc.isenabled()
    with contextlib.suppress(CapcliError), garbage_collection_paused():
        assert not gc.isenabled()
        raise CapcliError("an error")
    assert gc.isenabled()
    gc.disable()
    try:
        with garbage_collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_text_is_read_without_heavy_packages_and_parquet_names_the_one_it_needs(photos: Path) -> None:
    table = write(photos / "t.csv", "image,caption\na.jpg,x\n")
    parquet(photos / "t.parquet", {"image": ["a.jpg"], "caption": ["x"]})
    script = (
        "import sys\n"
        "from capcli.annotations import DataReport, read_annotations\n"
        "from capcli.options import DataOptions\n"
        "def read(path):\n"
        "    return list(read_annotations([path], DataOptions(), locate=True, report=DataReport()))\n"
        "print(len(read(sys.argv[1])), {'torch', 'pyarrow', 'datasets', 'transformers'} & set(sys.modules))\n"
        "sys.modules['pyarrow'] = None\n"
        "read(sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, table, photos / "t.parquet"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "1 set()"
    assert "pip install 'capcli[train]'" in ended.stderr.splitlines()[-1]


@needs_data
def test_annotations_of_flickr8k_and_coco() -> None:
    files = [DATA / "flickr8k" / name for name in ("captions.txt", "captions.zh.txt")]
    images = read(*files)
    assert len(images) == 7000
    assert {len(image.captions) for image in images} == {10}
    assert len({image.image for image in images}) == 7000
    assert [text.isascii() for text in images[0].captions] == [True] * 5 + [False] * 5
    coco = read(DATA / "photos" / "coco_captions.json")
    assert (len(coco), sum(len(image.captions) for image in coco)) == (80, 400)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], min_codepoint=1), max_size=12).filter(
    lambda text: clean(text) not in MISSING_TEXTS  # which are empty cells
)
BEGINNINGS = (
    b"image,caption\n",
    b"a.jpg#0\t",
    b'{"images": [',
    b'{"image": "a", "text": "b"}\n',
    b"[{",
    b"PAR1",
    b"\xff\xfe",
    b"",
)
PIECES = (
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\t",
    b"{",
    b"}",
    b"]",
    b":",
    b"1",
    b"NaN",
    b"a.jpg",
    b"#0",
    b"\0",
    b"\xff",
    b'"caption"',
)


def expected(rows: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The captions of rows of a name and a caption: spellings of a name are one image, white space is stripped."""
    captions: dict[str, list[str]] = {}
    for name, text in rows:
        kept = [re.sub("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+", " ", text.strip())] if text.strip() else []
        captions.setdefault(os.path.normpath(name) if "://" not in name else name, []).extend(kept)
    return {name: texts for name, texts in captions.items() if texts}


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(TEXTS.filter(bool), TEXTS.filter(lambda text: not text.startswith("["))).filter(
            lambda row: any(cell.strip() for cell in row)  # a row of blank cells is a blank line
        ),
        min_size=1,
        max_size=6,
    )
)
def test_rows_that_are_written_are_read_back(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"t.{suffix}", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL).writerows([("image", "caption"), *rows])
    write(tmp_path / "t.jsonl", "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows))
    write(
        tmp_path / "t.json", json.dumps([{"image": name, "caption": text} for name, text in rows], ensure_ascii=False)
    )
    wanted = expected(rows)
    for name in ("t.csv", "t.tsv", "t.jsonl", "t.json"):
        if wanted:
            images = read(tmp_path / name, locate=False)
            found = [
                (image.name if "://" in image.name else os.path.normpath(image.name), image.captions)
                for image in images
            ]
            assert found == [(key, tuple(texts)) for key, texts in wanted.items()], name
        else:
            with pytest.raises(CapcliError, match="no image has a caption"):
                read(tmp_path / name, locate=False)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(BEGINNINGS), st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=3)), max_size=30))
def test_any_bytes_are_annotations_or_one_clear_error(tmp_path: Path, beginning: bytes, pieces: list[bytes]) -> None:
    path = write(tmp_path / "any", beginning + b"".join(pieces))
    message = "any"
    try:
        images = read(path, locate=False)
    except CapcliError as error:
        message, images = str(error), []
    assert "any" in message
    assert "\n" not in message
    assert all(image.name and image.captions for image in images)


@pytest.mark.parametrize("column", ["image", "pixels of it"])
def test_a_dataset_column_of_bytes_is_images(column: str, photos: Path) -> None:
    datasets = pytest.importorskip("datasets")
    content = [(photos / name).read_bytes() for name in TWO]
    rows = {column: [content[0], content[0], content[1]], "text": ["A dog.", "A brown dog.", "Two cats."]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(photos / "set"))
    found = read(photos / "set")
    assert [image.captions for image in found] == list(TWO.values())
    assert [image.image for image in found] == [Stored(str(photos / "set"), row, column) for row in (0, 2)]


def test_image_bytes_are_not_a_name(photos: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [(photos / name).read_bytes() for name in TWO], "text": ["A dog.", "Two cats."]}
    datasets.Dataset.from_dict(rows).to_parquet(str(photos / "t.parquet"))
    with pytest.raises(CapcliError, match="images inside") as raised:
        read(photos / "t.parquet")
    assert len(str(raised.value)) < 500


def test_captions_of_an_image_in_two_splits_of_a_dataset_count_once(photos: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(photos / "a.jpg")] * 2, "caption": ["A dog.", "A dog."]}
    split = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(str(photos / "set"))
    (image,) = read(photos / "set")
    assert (image.captions, image.split) == (("A dog.", "A dog."), "val")


def test_long_names_are_cut_in_messages(tmp_path: Path) -> None:
    data = write(tmp_path / "c.csv", f"image,caption\n{'x' * 5000}.jpg,text\n")
    with pytest.raises(CapcliError) as raised:
        read(data)
    assert "xxx" in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_very_long_cell_is_read(photos: Path) -> None:
    long = "x" * 200_000
    data = write(photos / "c.csv", f"image,caption\na.jpg,{long}\nb.png,Two cats.\n")
    assert captions_by_name(read(data)) == {"a.jpg": (long,), "b.png": ("Two cats.",)}


def test_two_columns_of_captions_are_both_read(photos: Path) -> None:
    data = write(photos / "c.csv", "image,caption,Caption\na.jpg,A dog.,A brown dog.\nb.png,Two cats.,Cats, two\n")
    assert captions_by_name(read(data)) == {"a.jpg": ("A dog.", "A brown dog."), "b.png": ("Two cats.", "Cats, two")}


def test_a_nul_byte_is_reported_with_its_line(photos: Path) -> None:
    data = write(photos / "c.csv", "image,caption\na.jpg,A d\0og.\n")
    with pytest.raises(CapcliError, match="line 2 has a NUL byte"):
        read(data)


def test_a_folder_named_as_an_image_is_a_folder(photos: Path) -> None:
    (photos / "dir.jpg").mkdir()
    report = DataReport()
    read(write(photos / "c.csv", "image,caption\na.jpg,A dog.\ndir.jpg,text\n"), report=report)
    assert [failure.message.split(" in ")[0] for failure in report.failures] == ["it is a folder"]
