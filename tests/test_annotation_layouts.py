"""Annotations as people have them: odd quotes, printed lists, other spellings of names, hidden files, many layouts."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import pytest
from running import Ended, call, paint, save_captioner

from capcli.annotations import DataReport, read_annotations
from capcli.options import DataOptions
from capcli.text import listed, tag_text

Captions = dict[str, list[str]]


def prepare(data: Path, out: Path, *arguments: object) -> Ended:
    return call("prepare", "--data", data, "--out", out, "--workers", 0, *arguments)


def stored(out: Path, split: str = "train") -> Captions:
    rows = datasets.load_from_disk(str(out))[split].select_columns(["file_name", "captions"])
    return {row["file_name"]: row["captions"] for row in rows}


def failed(out: Path) -> list[tuple[str, str]]:
    lines = (out / "failures.jsonl").read_text().splitlines()
    return [(row["file_name"], row["error"]) for row in map(json.loads, lines)]


def read(path: Path, report: DataReport | None = None, **options: Any) -> Captions:
    """The captions by the name of the file that was found."""
    images = read_annotations(
        [str(path)], DataOptions(**options), locate=True, report=DataReport() if report is None else report
    )
    return {os.path.basename(str(image.image)): list(image.captions) for image in images}


def save(path: Path, content: str | bytes | object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), newline="", encoding="utf-8")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return paint(tmp_path, "a.jpg", "b.png")


# Quotes


def test_quotes_in_a_tsv_are_letters(tmp_path: Path) -> None:
    captions = ["a man holds a sign", '"stop" says the sign', '"welcome home', "a dog", 'a sign that says "exit"']
    paint(tmp_path, *(f"{number}.jpg" for number in range(5)))
    rows = "".join(f"{number}.jpg\t{text}\n" for number, text in enumerate(captions))
    data = save(tmp_path / "captions.tsv", "image\tcaption\n" + rows)
    ran = prepare(data, tmp_path / "out")
    assert ran.code == 0, ran.err
    assert stored(tmp_path / "out") == {f"{number}.jpg": [text] for number, text in enumerate(captions)}


@pytest.mark.parametrize(
    ("table", "first", "second"),
    [
        ('image|caption\na.jpg|"hi" he says\nb.png|"open\n', '"hi" he says', '"open'),
        ('a.jpg\t"hi" he says\nb.png\t"whole"\n', '"hi" he says', "whole"),
        ('image\tcaption\na.jpg\t"""hi"" he says"\nb.png\t"up\ndown"\n', '"hi" he says', "up down"),
        ('caption\timage\n"up\ndown"\ta.jpg\n"open\tb.png\n', "up down", '"open'),
        ('image\tcaption\na.jpg\t"one\nb.png\tnice sign"\n', '"one', 'nice sign"'),
        ('"image"\t"caption"\n"a.jpg"\t"one\tand\ntwo\tthree"\n"b.png"\t"x"\n', "one\tand two\tthree", "x"),
        ('image,caption\na.jpg,"hi" he says, ok\nb.png,x "y"\n', '"hi" he says, ok', 'x "y"'),
        ('image, caption\na.jpg, "one, two"\nb.png, x\n', "one, two", "x"),
        ("image,caption\r\na.jpg,one\rtwo\r\nb.png,x\r\n", "one two", "x"),
    ],
)
def test_a_cell_is_quoted_as_a_whole_or_not_at_all(photos: Path, table: str, first: str, second: str) -> None:
    assert read(save(photos / "t.txt", table)) == {"a.jpg": [first], "b.png": [second]}


def test_an_unclosed_quote_in_a_csv_is_the_failure_of_its_row(photos: Path) -> None:
    paint(photos, "c.jpg")
    data = save(photos / "c.csv", 'image,caption\na.jpg,"one\nb.png,two"\nc.jpg,"three\nand four"\n')
    ran = prepare(data, photos / "out")
    assert ran.code == 3
    assert "line 2 opens a quote that is never closed" in ran.err
    assert stored(photos / "out") == {"b.png": ['two"'], "c.jpg": ["three and four"]}


# Printed lists


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (str(["a dog runs", "a dog's ball"]), ["a dog runs", "a dog's ball"]),
        ("['a bus'\n 'a red bus']", ["a bus", "a red bus"]),
        ("[list(['a', 'b']) list([\"c's\"])]", ["a", "b", "c's"]),
        ("[array(['a'], dtype=object), array(['b'], dtype='<U1')]", ["a", "b"]),
        ("array(['a', 'b'], dtype=object)", ["a", "b"]),
        ("[np.str_('a'), np.float64(nan)]", ["a", None]),
        ("('a', 'b')", ["a", "b"]),
        ("[['a'], ['b', nan, <NA>, NaT, None]]", ["a", "b", None, None, None, None]),
        (str([{"raw": "a", "tokens": ["a"]}]), [{"raw": "a", "tokens": ["a"]}]),
        ('["a", null]', ["a", None]),
        (r"['it\'s \"x\"', 'y']", ['it\'s "x"', "y"]),
        ("[]", []),
        ("[12]", None),
        ("[a dog]", None),
        ("['a'] and ['b']", None),
        ("('a')", None),
        ("(a dog, 'b')", None),
        ("['a'", None),
        ("[" * 5000, None),
    ],
)
def test_a_list_as_programs_print_it(cell: str, found: list[object] | None) -> None:
    assert listed(cell) == found


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json", "parquet", "dataset"])
def test_printed_lists_and_missing_values_are_no_captions(photos: Path, form: str) -> None:
    import pandas

    paint(photos, "c.jpg", "d.jpg", "e.jpg", "f.jpg")
    cells = ["['one', \"two's\"]", "['three'\n 'four']", "nan", "None", "[nan, 'five']", "<NA>"]
    table = pandas.DataFrame({"image": ["a.jpg", "b.png", "c.jpg", "d.jpg", "e.jpg", "f.jpg"], "caption": cells})
    path = photos / f"t.{form}"
    if form in ("csv", "tsv"):
        table.to_csv(path, index=False, sep="," if form == "csv" else "\t")
    elif form == "parquet":
        table.to_parquet(path)
    elif form == "dataset":
        datasets.Dataset.from_pandas(table).save_to_disk(str(path))
    else:
        table.to_json(path, orient="records", lines=form == "jsonl")
    report = DataReport()
    assert read(path, report) == {"a.jpg": ["one", "two's"], "b.png": ["three", "four"], "e.jpg": ["five"]}
    assert report.empty_captions == 4


def test_nested_lists_of_a_parquet_file_are_captions(photos: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"image": ["a.jpg"], "captions": [[["one"], ["two", None]]]}), photos / "t.parquet")
    assert read(photos / "t.parquet") == {"a.jpg": ["one", "two"]}


def test_tags_as_a_printed_list() -> None:
    assert tag_text("['dog', 'bark']") == "[dog] [bark]"
    assert (tag_text("nan"), tag_text("[]"), tag_text("[dog] [bark]")) == ("", "", "[dog] [bark]")


# Names in another spelling


def test_names_of_a_list_may_have_another_unicode_form(tmp_path: Path) -> None:
    names = ["K\u00e4fer.jpg", "\u304c.jpg", "plain.jpg", "other.jpg"]
    paint(tmp_path, *(unicodedata.normalize("NFD", name) for name in names))
    data = save(tmp_path / "captions.csv", "image,caption\n" + "".join(f"{name},x\n" for name in names))
    listing = "".join(unicodedata.normalize("NFD", f"{name}\r\n") for name in names[:3])
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        out = tmp_path / encoding
        ran = prepare(data, out, "--val-names", save(tmp_path / "val.txt", listing.encode(encoding)))
        assert ran.code == 0, ran.err
        assert list(stored(out, "val")) == names[:3]
        assert list(stored(out)) == names[3:]


def test_an_exact_name_matches_first_and_another_form_only_where_it_is_unique(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "\u00e9\u00e9.jpg") for form in ("NFC", "NFD"))
    mixed = "\u00e9e\u0301.jpg"
    paint(tmp_path, composed, decomposed, "x.jpg")
    data = save(tmp_path / "c.csv", f"image,caption\n{composed},one\n{decomposed},two\nx.jpg,x\n")
    assert prepare(data, tmp_path / "1", "--val-names", save(tmp_path / "1.txt", f"{decomposed}\n")).code == 0
    assert stored(tmp_path / "1", "val") == {decomposed: ["two"]}
    ran = prepare(data, tmp_path / "2", "--val-names", save(tmp_path / "2.txt", f"{mixed}\nx.jpg\n"))
    assert "1 of 2 names" in ran.err
    assert list(stored(tmp_path / "2", "val")) == ["x.jpg"]


def test_files_and_folders_of_another_unicode_form_are_found(tmp_path: Path) -> None:
    paint(tmp_path, unicodedata.normalize("NFD", "Bl\u00fcten/sch\u00f6n/") + "K\u00e4fer.jpg", "t\u00e9.jpg")
    save(tmp_path / unicodedata.normalize("NFD", "t\u00e9.txt"), "beside")
    data = save(tmp_path / "c.csv", "image,caption\nBl\u00fcten/sch\u00f6n/K\u00e4fer.jpg,x\nnicht/sch\u00f6n.jpg,y\n")
    report = DataReport()
    assert list(read(data, report).values()) == [["x"]]
    assert report.missing == 1
    assert read(tmp_path) == {"t\u00e9.jpg": ["beside"]}


def test_references_of_two_files_are_those_of_one_image_in_any_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9.jpg") for form in ("NFC", "NFD"))
    first = save(tmp_path / "1.csv", f"image,caption\n{composed},one\nb.jpg,x\n")
    second = save(tmp_path / "2.csv", f"image,caption\n{decomposed},two\n")
    both = save(tmp_path / "3.csv", f"image,caption\n{composed},one\n{decomposed},two\n")

    def references(*paths: Path) -> Captions:
        found = read_annotations([*map(str, paths)], DataOptions(), locate=False, report=DataReport())
        return {image.name: list(image.captions) for image in found}

    assert references(first, second) == {composed: ["one", "two"], "b.jpg": ["x"]}
    assert references(both) == {composed: ["one"], decomposed: ["two"]}


def test_tags_are_found_in_another_unicode_form(tmp_path: Path) -> None:
    from capcli.annotations.metadata import MetadataColumn

    rows = [{"file_name": "K\u00e4.jpg", "tags": ["dog"]}, {"file_name": "b.jpg", "tags": ["cat"]}]
    save(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)) + "\n{")
    tags = MetadataColumn("tags")
    assert tags.of(str(tmp_path / unicodedata.normalize("NFD", "K\u00e4.jpg"))) == "[dog]"
    assert tags.of(str(tmp_path / "b.jpg")) == "[cat]"


@pytest.mark.parametrize("prefix", ["/content/drive/train/", "D:\\lora\\train\\", "\\\\server\\share\\", "file:///x/"])
def test_whole_paths_of_another_machine_are_found_below_the_image_root(tmp_path: Path, prefix: str) -> None:
    paint(tmp_path / "photos", "0.jpg", "1.jpg")
    meta = {f"{prefix}{number}.jpg": {"caption": f"picture {number}"} for number in range(2)}
    data = save(tmp_path / "meta.json", meta)
    ran = prepare(data, tmp_path / "out", "--image-root", tmp_path / "photos")
    assert ran.code == 0, ran.err
    assert list(stored(tmp_path / "out").values()) == [["picture 0"], ["picture 1"]]
    assert prepare(data, tmp_path / "out 2").code == 1


def test_the_longest_end_of_a_path_counts_and_a_shared_one_is_none(tmp_path: Path) -> None:
    paint(tmp_path, "1/a.jpg", "2/a.jpg", "c.jpg")
    meta = {"/x/1/a.jpg": "one", "C:\\x\\2\\a.jpg": "two", "/x/3/c.jpg": "three", "/x/4/c.jpg": "four"}
    report = DataReport()
    found = read_annotations(
        [str(save(tmp_path / "m.json", meta))], DataOptions(image_root=str(tmp_path)), locate=True, report=report
    )
    assert {os.path.relpath(str(image.image), tmp_path): image.captions for image in found} == {
        "1/a.jpg": ("one",),
        "2/a.jpg": ("two",),
    }
    assert [(failure.name, failure.error) for failure in report.failures] == [
        ("/x/3/c.jpg", "missing"),
        ("/x/4/c.jpg", "missing"),
    ]


def test_names_that_programs_change(tmp_path: Path) -> None:
    paint(tmp_path, "my a.jpg", "17.jpg", "18.png", "b.jpg")
    table = save(tmp_path / "t.csv", "image,caption\nmy%20a.jpg,one\n17.0,two\n18,three\n./b.jpg,four\n")
    assert read(table) == {"my a.jpg": ["one"], "17.jpg": ["two"], "18.png": ["three"], "b.jpg": ["four"]}
    rows = [{"image": 17.0, "caption": "two"}, {"image": ["18.png"], "caption": "three"}]
    assert read(save(tmp_path / "t.json", rows)) == {"17.jpg": ["two"], "18.png": ["three"]}


# Hidden files and text files that cannot be read


def test_hidden_files_and_folders_of_other_programs_are_left_out(tmp_path: Path) -> None:
    hidden = ("._a", ".ipynb_checkpoints/b", "__MACOSX/a", "@eaDir/a", "#recycle/a", "$RECYCLE.BIN/a")
    paint(tmp_path / "data", "a.jpg", *(f"{name}.jpg" for name in hidden), "cat/c.jpg", "cat/@eaDir/c.jpg")
    for name in ("a", *hidden):
        save(tmp_path / "data" / f"{name}.txt", b"\xff\0" if name.startswith("._") else b"a text")
    ran = prepare(tmp_path / "data", tmp_path / "out")
    assert stored(tmp_path / "out") == {"a.jpg": ["a text"]}
    assert failed(tmp_path / "out") == [("cat/c.jpg", "no-caption")]
    assert ran.err.count("folders named @eaDir are left out") == 1
    assert ".ipynb_checkpoints" not in ran.err
    assert read(tmp_path / "data", label_template="a {label}") == {"c.jpg": ["a cat"]}


def test_folders_of_other_programs_are_no_source_and_that_is_said_once(tmp_path: Path) -> None:
    model = save_captioner(tmp_path / "model")
    paint(tmp_path / "photos", "a.jpg", "@eaDir/a.jpg", "x/@eaDir/b.jpg", "x/b.jpg")
    ran = call("caption", tmp_path / "photos", "--model", model, "--out", tmp_path / "c.jsonl", "--workers", 0)
    rows = [json.loads(line)["file_name"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert (ran.code, rows) == (0, ["a.jpg", "x/b.jpg"])
    assert ran.err.count("folders named @eaDir are left out") == 1
    named = ("--include", "**/@eaDir/**", "--out", tmp_path / "d.jsonl", "--workers", 0)
    assert call("caption", tmp_path / "photos", "--model", model, *named).code == 0
    rows = [json.loads(line)["file_name"] for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert rows == ["@eaDir/a.jpg", "x/@eaDir/b.jpg"]


def test_a_text_file_that_cannot_be_read_is_one_failure(tmp_path: Path) -> None:
    paint(tmp_path / "data", *(f"{number}.jpg" for number in range(6)))
    contents = [b"a red square\n", b"a man\x92s hat\n", b"\xef\xbb\xbfa bus\r\n", "sixteen".encode("utf-16"), b"a\0b"]
    for number, content in enumerate(contents):
        (tmp_path / "data" / f"{number}.txt").write_bytes(content)
    (tmp_path / "data" / "5.txt").symlink_to("nowhere")
    ran = prepare(tmp_path / "data", tmp_path / "out")
    assert ran.code == 3
    assert stored(tmp_path / "out") == {"0.jpg": ["a red square"], "2.jpg": ["a bus"], "3.jpg": ["sixteen"]}
    assert failed(tmp_path / "out") == [(f"{number}.jpg", "unreadable-row") for number in (1, 4, 5)]
    for number in (0, 2, 3):
        (tmp_path / "data" / f"{number}.txt").unlink()
    ran = prepare(tmp_path / "data", tmp_path / "out 2")
    assert ran.code == 1
    assert "1.txt: line 1 is not UTF-8" in ran.err


# Layouts


def test_captions_beside_images(tmp_path: Path) -> None:
    paint(tmp_path, *(f"{letter}.jpg" for letter in "abcde"))
    save(tmp_path / "a.jpg.txt", "A dog.")
    save(tmp_path / "b.json", {"caption": "Two cats.", "title": "b.jpg"})
    save(tmp_path / "c.jpg.json", {"captions": ["one", "two"], "width": 3})
    save(tmp_path / "d.TXT", "First paragraph.\n\nSecond paragraph.\n")
    save(tmp_path / "e.json", [1])
    save(tmp_path / "e.txt", "text before JSON")
    report = DataReport()
    expected = {"a.jpg": ["A dog."], "b.jpg": ["Two cats."], "c.jpg": ["one", "two"], "e.jpg": ["text before JSON"]}
    assert read(tmp_path, report) == expected | {"d.jpg": ["First paragraph.", "Second paragraph."]}
    assert [note for note in report.notes if "1 image with several lines" in note and "--text-files whole" in note]
    report = DataReport()
    assert read(tmp_path, report, text_files="whole")["d.jpg"] == ["First paragraph. Second paragraph."]
    assert report.notes == []
    assert prepare(tmp_path, tmp_path / "out", "--text-files", "whole").code == 0
    assert stored(tmp_path / "out")["d.jpg"] == ["First paragraph. Second paragraph."]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_numbered_columns_of_captions_are_all_read(photos: Path, suffix: str) -> None:
    import pandas

    columns = {"image": ["a.jpg", "b.png"], "caption_0": ["one", "three"], "caption_1": ["two", None], "n_1": [1, 2]}
    path, table = photos / f"t.{suffix}", pandas.DataFrame(columns)
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    report = DataReport()
    assert read(path, report) == {"a.jpg": ["one", "two"], "b.png": ["three"]}
    assert report.empty_captions == 0
    assert read(path, caption_column="caption_1") == {"a.jpg": ["two"]}


def test_conversations_give_their_first_reply(photos: Path) -> None:
    question, answer = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}
    llava = [
        {"id": 1, "image": "a.jpg", "conversations": [question, answer, question, {"from": "gpt", "value": "red"}]},
        {"id": 2, "conversations": [question, answer]},
        {"id": 3, "image": "b.png", "conversations": [{"from": "gpt", "value": "Cats."}]},
    ]
    report = DataReport()
    assert read(save(photos / "llava.json", llava), report) == {"a.jpg": ["A dog."], "b.png": ["Cats."]}
    assert (report.unread, len(report.notes)) == (0, 1)
    reply = {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
    row = {"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>Describe it."}, reply]}
    assert read(save(photos / "messages.jsonl", row)) == {"a.jpg": ["A dog."]}


def test_a_conversation_in_a_cell_or_with_its_image_inside(photos: Path) -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A dog."}]
    table = "image\tconversations\na.jpg\t" + json.dumps(turns) + "\n"
    assert read(save(photos / "t.tsv", table)) == {"a.jpg": ["A dog."]}
    question = {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "?"}]}
    row = {"messages": [question, {"role": "assistant", "content": "Cats."}]}
    assert read(save(photos / "t.jsonl", row)) == {"b.png": ["Cats."]}


def test_two_parquet_columns_of_one_name_and_captions_by_position(photos: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    columns = [pyarrow.array([value]) for value in ("a.jpg", "one", "two")]
    write_table(pyarrow.Table.from_arrays(columns, names=["image", "caption", "caption"]), photos / "t.parquet")
    assert read(photos / "t.parquet") == {"a.jpg": ["one", "two"]}
    rows = [{"image": "a.jpg", "captions": {"0": "one", "1": "two"}}]
    assert read(save(photos / "t.json", rows)) == {"a.jpg": ["one", "two"]}


def test_textcaps(tmp_path: Path) -> None:
    paint(tmp_path, "train_images/a1.jpg")
    row = {"image_id": "a1", "image_name": "a1", "image_path": "train/a1.jpg", "set_name": "train"}
    captions = [row | {"caption_str": text, "reference_strs": ["one", "two"]} for text in ("one", "two")]
    data = save(tmp_path / "TextCaps_0.1_train.json", {"dataset_name": "textcaps", "data": captions})
    assert read(data) == {"a1.jpg": ["one", "two"]}


def test_rejected_captions_are_left_out(photos: Path) -> None:
    captions = [(1, "one", False), (1, "two", True), (2, "three", False)]
    keys = ("image_id", "caption", "is_rejected")
    vizwiz = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [dict(zip(keys, values, strict=True)) for values in captions],
    }
    report = DataReport()
    expected = {"a.jpg": ["one"], "b.png": ["three"]}
    assert read(save(photos / "v.json", vizwiz), report) == expected
    assert report.notes == ["1 image with captions marked as rejected, which are left out"]
    rows = "".join(f"{'ab'[number - 1]}.{['jpg', 'png'][number - 1]},{text},{no}\n" for number, text, no in captions)
    assert read(save(photos / "v.csv", "image,caption,is_rejected\n" + rows)) == expected


def test_json_with_commas_after_its_rows(photos: Path) -> None:
    rows = '{"image": "a.jpg", "caption": "one"},\n{"image": "b.png", "caption": "two"},\n'
    for content in (rows, f"[\n{rows}]\n"):
        assert read(save(photos / "t.json", content)) == {"a.jpg": ["one"], "b.png": ["two"]}


def test_captions_by_name_with_a_gap(photos: Path) -> None:
    for gap in (None, {"tags": "x"}):
        assert read(save(photos / "t.json", {"a.jpg": {"caption": "one"}, "b.png": gap})) == {"a.jpg": ["one"]}
