"""Which images are for training and which for validation; and the check that each can be decoded."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from running import paint

from capcli.annotations import DataReport, Split, check_images, read_annotations, read_split
from capcli.errors import CapcliError, UsageError
from capcli.options import DataOptions
from capcli.records import Annotated, Stored

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
NAMES = [f"{number:03}.jpg" for number in range(200)]


def split(*data: Path, **options: Any) -> Split:
    for name, value in options.items():
        if isinstance(value, Path):
            options[name] = str(value)
    return read_split(DataOptions(data=tuple(map(str, data)), **options))


def names(images: list[Annotated]) -> list[str]:
    return [image.name for image in images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 empty files with two captions each; reading opens no image."""
    for name in NAMES:
        (tmp_path / name).touch()
    rows = [f"{name},caption {number} of {name}" for number in (1, 2) for name in NAMES]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    return tmp_path


def listed(path: Path, images: list[str]) -> Path:
    path.write_text("".join(f"{name}\r\n" for name in images))
    return path


def test_all_images_are_for_training_by_default(folder: Path) -> None:
    found = split(folder / "captions.csv")
    assert (names(found.train), found.val) == (NAMES, [])
    assert {image.split for image in found.train} == {"train"}
    assert (found.report.images, found.report.captions) == (200, 400)


def test_validation_images_are_drawn_by_image(folder: Path) -> None:
    found = split(folder / "captions.csv", val_fraction=0.1)
    assert (len(found.train), len(found.val)) == (180, 20)
    assert sorted(names(found.train) + names(found.val)) == NAMES
    assert {len(image.captions) for image in found.train + found.val} == {2}
    assert names(found.val) == sorted(names(found.val)) != NAMES[:20]
    assert names(split(folder / "captions.csv", val_fraction=0.1, seed=7).val) != names(found.val)

    header, *rows = (folder / "captions.csv").read_text().splitlines()
    shuffled = [header, *random.Random(3).sample(rows, len(rows))]
    (folder / "shuffled.csv").write_text("\n".join(shuffled))
    again = split(folder / "shuffled.csv", val_fraction=0.1)
    assert set(names(again.val)) == set(names(found.val))
    assert names(again.val) != names(found.val)


def test_a_share_of_few_images_leaves_one_on_either_side(folder: Path) -> None:
    for count, share, sizes in ((2, 0.01, (1, 1)), (2, 0.99, (1, 1)), (1, 0.5, (1, 0)), (3, 0.99, (1, 2))):
        rows = [f"{name},x" for name in NAMES[:count]]
        (folder / "few.csv").write_text("\n".join(["image,caption", *rows]))
        found = split(folder / "few.csv", val_fraction=share)
        assert (len(found.train), len(found.val)) == sizes


def test_an_image_in_two_files_is_one_image(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(folder)
    other = [f"../{name},Bild {name}" for name in NAMES[:50]] + [
        f"{folder}/link/{name},image {name}" for name in NAMES[40:60]
    ]
    (folder / "sub" / "more.csv").write_text("\n".join(["image,caption", *other]))
    found = split(folder / "captions.csv", folder / "sub" / "more.csv", val_fraction=0.5)
    images = found.train + found.val
    assert len(images) == len({os.path.realpath(str(image.image)) for image in images}) == 200
    assert found.report.captions == 470
    assert not {os.path.realpath(str(i.image)) for i in found.train} & {
        os.path.realpath(str(i.image)) for i in found.val
    }


def test_lists_of_names(folder: Path) -> None:
    train = listed(folder / "train.lst", ["", *NAMES[:100], "gone.jpg"])
    val = listed(folder / "val.lst", [f"photos/{name}" for name in NAMES[150:160]] + ["161", "./162.jpg", NAMES[0]])
    found = split(folder / "captions.csv", train_names=train, val_names=val)
    assert names(found.train) == NAMES[1:100]
    assert names(found.val) == [NAMES[0], *NAMES[150:160], "161.jpg", "162.jpg"]
    assert [note for note in found.report.notes if "1 of 101 names" in note and "gone.jpg" in note]
    assert [note for note in found.report.notes if "both lists" in note and "000.jpg" in note]
    rest = split(folder / "captions.csv", val_names=val)
    assert names(rest.train) == [name for name in NAMES if name not in names(found.val)]
    only = split(folder / "captions.csv", train_names=train)
    assert (names(only.train), only.val) == (NAMES[:100], [])
    drawn = split(folder / "captions.csv", train_names=train, val_fraction=0.1)
    assert (sorted(names(drawn.train) + names(drawn.val)), len(drawn.val)) == (NAMES[:100], 10)


def test_images_in_no_list_may_be_missing(folder: Path) -> None:
    for name in NAMES[100:]:
        (folder / name).unlink()
    train, val = listed(folder / "t", NAMES[:90]), listed(folder / "v", NAMES[90:101])
    found = split(folder / "captions.csv", train_names=train, val_names=val)
    assert (len(found.train), len(found.val), found.report.missing) == (90, 10, 1)
    assert found.report.line() == "100 images, 200 captions; left out: 1 missing"


def test_a_list_of_other_names_is_an_error_with_examples(folder: Path) -> None:
    with pytest.raises(CapcliError, match=r"v and the data .*: other\.png in the list, 000\.jpg in the data"):
        split(folder / "captions.csv", val_names=listed(folder / "v", ["other.png"]))
    with pytest.raises(CapcliError, match="lists no image"):
        split(folder / "captions.csv", val_names=listed(folder / "v", []))
    with pytest.raises(UsageError, match="nowhere"):
        split(folder / "captions.csv", val_names=folder / "nowhere")


def test_a_name_in_two_folders_matches_neither(tmp_path: Path) -> None:
    paint(tmp_path, "x/1.jpg", "y/1.jpg", "y/2.jpg")
    (tmp_path / "c.csv").write_text("image,caption\nx/1.jpg,a\ny/1.jpg,b\ny/2.jpg,c\n")
    found = split(tmp_path / "c.csv", val_names=listed(tmp_path / "v", ["1.jpg", "2.jpg"]))
    assert names(found.val) == ["y/2.jpg"]
    assert len(found.report.notes) == 1


def test_splits_of_the_annotations(folder: Path) -> None:
    words = ["train", "restval", "Validation", "dev", "test", ""]
    images = [
        {"filename": name, "split": word, "sentences": [{"raw": name}]}
        for name, word in zip(NAMES, words, strict=False)
    ]
    (folder / "karpathy.json").write_text(json.dumps({"images": images}))
    found = split(folder / "karpathy.json")
    assert (names(found.train), names(found.val)) == (["000.jpg", "001.jpg", "005.jpg"], ["002.jpg", "003.jpg"])
    drawn = split(folder / "karpathy.json", val_fraction=0.2)
    assert sorted(names(drawn.train) + names(drawn.val)) == ["000.jpg", "001.jpg", "002.jpg", "003.jpg", "005.jpg"]
    (folder / "t.csv").write_text("image,caption,part\n000.jpg,x,train\n001.jpg,x,test\n002.jpg,x,val\n")
    named = split(folder / "t.csv", split_column="part")
    assert (names(named.train), names(named.val)) == (["000.jpg"], ["002.jpg"])


def test_an_image_with_rows_in_two_splits_is_held_out(folder: Path) -> None:
    rows = ["000.jpg,a,train", "001.jpg,b,train", "./000.jpg,c,val", "001.jpg,d,test", "002.jpg,e,train"]
    (folder / "t.csv").write_text("\n".join(["image,caption,split", *rows]))
    found = split(folder / "t.csv")
    assert (names(found.train), names(found.val)) == (["002.jpg"], ["000.jpg"])
    assert found.val[0].captions == ("a", "c")
    assert [note for note in found.report.notes if note.startswith("2 images in more than one split")]


def test_separate_validation_data(folder: Path) -> None:
    rows = [f"{name},x,{word}" for name, word in zip(NAMES[150:153], ("val", "test", "train"), strict=True)]
    (folder / "val.csv").write_text("\n".join(["image,caption,split", *rows]))
    found = split(folder / "captions.csv", val_data=(str(folder / "val.csv"),))
    assert names(found.val) == ["150.jpg"]
    assert names(found.train) == [name for name in NAMES if name != "150.jpg"]
    assert [note for note in found.report.notes if "not trained on" in note]
    (folder / "val.csv").write_text("\n".join(["image,caption,split", "001.jpg,x,train"]))
    assert names(split(folder / "captions.csv", val_data=(str(folder / "val.csv"),)).val) == ["001.jpg"]
    (folder / "val.csv").write_text("\n".join(["image,caption", "none.jpg,x"]))
    with pytest.raises(CapcliError, match=r"val\.csv.*none\.jpg"):
        split(folder / "captions.csv", val_data=(str(folder / "val.csv"),))


def test_limits(folder: Path) -> None:
    found = split(folder / "captions.csv", val_fraction=0.5, train_limit=30, val_limit=0.1)
    whole = split(folder / "captions.csv", val_fraction=0.5)
    assert (len(found.train), len(found.val)) == (30, 10)
    assert set(names(found.train)) < set(names(whole.train))
    assert names(found.train) == sorted(names(found.train)) != names(whole.train)[:30]
    assert (found.report.images, found.report.captions) == (40, 80)
    assert len(split(folder / "captions.csv", train_limit=1).train) == 1
    assert len(split(folder / "captions.csv", train_limit=1000).train) == 200
    assert len(split(folder / "captions.csv", train_limit=0.0001).train) == 1


def test_test_images_alone_are_an_error(folder: Path) -> None:
    (folder / "t.csv").write_text("image,caption,split\n000.jpg,x,test\n")
    with pytest.raises(CapcliError, match=r"t\.csv: no image is left"):
        split(folder / "t.csv")


def test_prepared_data_as_its_own_validation_data(tmp_path: Path) -> None:
    import datasets

    pictures = [{"bytes": (paint(tmp_path, "a.png", seed=n) / "a.png").read_bytes(), "path": None} for n in range(6)]

    def dataset(*numbers: int) -> Any:
        columns = {
            "file_name": [f"{n}.png" for n in numbers],
            "image": [pictures[n] for n in numbers],
            "captions": [[f"number {n}"] for n in numbers],
        }
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    datasets.DatasetDict({"train": dataset(0, 1, 2, 3), "val": dataset(3, 4), "test": dataset(5)}).save_to_disk(
        str(tmp_path / "set")
    )
    found = split(tmp_path / "set")
    assert (names(found.train), names(found.val)) == (["0.png", "1.png", "2.png"], ["3.png", "4.png"])
    assert found.val[1].image == Stored(str(tmp_path / "set" / "val"), 1)
    against = split(tmp_path / "set", val_data=(str(tmp_path / "set"),))
    assert not set(names(against.train)) & set(names(against.val))
    assert check_images(found.train, found.report) == found.train


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_found_and_left_out(tmp_path: Path, workers: int) -> None:
    paint(tmp_path, "a.jpg", "b.png", "c.webp", "d.jpg")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:300])
    (tmp_path / "d.jpg").write_bytes(b"")
    (tmp_path / "e.gif").write_text("no image at all")
    rows = "".join(f"{name},x\n{name},y\n" for name in ("a.jpg", "b.png", "c.webp", "d.jpg", "e.gif", "f.jpg"))
    (tmp_path / "t.csv").write_text("image,caption\n" + rows)
    report = DataReport()
    images = list(read_annotations([str(tmp_path / "t.csv")], DataOptions(), locate=True, report=report))
    calls: list[tuple[int, int]] = []
    good = check_images(images, report, workers=workers, progress=lambda *counts: calls.append(counts))
    assert names(good) == ["a.jpg", "c.webp"]
    assert {failure.name: failure.error for failure in report.failures} == {
        "b.png": "unreadable",
        "d.jpg": "empty",
        "e.gif": "unknown-format",
        "f.jpg": "missing",
    }
    assert calls == [(number, 5) for number in range(1, 6)]
    assert (report.images, report.captions) == (2, 4)
    assert report.line() == "2 images, 4 captions; left out: 1 missing, 3 broken"


def test_it_is_an_error_if_no_image_can_be_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    image = Annotated("a.jpg", str(tmp_path / "a.jpg"), ("x",))
    with pytest.raises(CapcliError, match=r"none of 1 image.*a\.jpg: it is not an image"):
        check_images([image], DataReport(), workers=0)
    small = Annotated("b.png", str(paint(tmp_path, "b.png") / "b.png"), ("x",))
    with pytest.raises(CapcliError, match="more than the limit of 100"):
        check_images([small], DataReport(), workers=0, max_pixels=100)
    assert check_images([], DataReport()) == []


@needs_data
def test_the_lists_of_flickr8k() -> None:
    flickr = DATA / "flickr8k"
    found = split(flickr / "captions.txt", train_names=flickr / "train.txt", val_names=flickr / "val.txt")
    assert (len(found.train), len(found.val)) == (6000, 1000)
    assert {len(image.captions) for image in found.train + found.val} == {5}
    assert found.report.line() == "7,000 images, 35,000 captions"
    assert not found.report.notes
    chinese = split(flickr / "captions.zh.txt", val_names=flickr / "val.txt")
    assert set(names(chinese.val)) == set(names(found.val))
    assert set(names(chinese.train)) == set(names(found.train))
