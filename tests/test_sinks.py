"""Sinks through `open_sink`: the content of rows, which images are wanted, and which outputs are refused."""

from __future__ import annotations

import base64
import csv
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sinking import caption_of, memory_folder, rows, run

from capcli.errors import CapcliError, UsageError
from capcli.options import SinkOptions
from capcli.records import Candidate, Caption, Entry, Failure
from capcli.sinks import open_sink
from capcli.storage.run_file import RunFile, difference
from capcli.text import is_text, printable

raw_names = st.binary(min_size=1, max_size=12).filter(lambda raw: b"\0" not in raw)
any_names = st.one_of(raw_names, st.text(min_size=1, max_size=8).map(lambda text: text.encode("utf-8", "replace")))
texts = st.one_of(st.text(max_size=20), st.text(alphabet='",\r\n\0\x1b\u2028a ', max_size=8)).map(
    lambda text: text.encode("utf-8", "replace").decode()
)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, strict=True))


def name_in(row: dict[str, str]) -> bytes:
    return base64.b64decode(row.get("file_name_bytes") or "") or row["file_name"].encode()


def test_a_json_row_is_as_documented(tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    caption = Caption("2024/beach.jpg", (Candidate("two dogs run along a beach", -0.412345),))
    run(["2024/beach.jpg"], SinkOptions(str(out)), caption=lambda _: caption)
    assert out.read_bytes() == (
        b'{"file_name": "2024/beach.jpg", "text": "two dogs run along a beach", "score": -0.4123}\n'
    )


def test_candidates_and_fields_come_in_order(tmp_path: Path) -> None:
    for out in (tmp_path / "a" / "c.jsonl", tmp_path / "b" / "c.csv"):
        options = SinkOptions(str(out), candidates=True, fields=("width", "sha256", "none"))
        run(["x"], options, caption=lambda name: caption_of(name, "ü, {}", 2, sha256="ab", width=3))
    candidates = [{"text": "ü, x", "score": -0.25}, {"text": "ü, x again", "score": -1.25}]
    (row,) = rows(tmp_path / "a" / "c.jsonl")
    assert list(row) == ["file_name", "text", "score", "candidates", "width", "sha256", "none"]
    assert row["candidates"] == candidates
    assert (row["width"], row["sha256"], row["none"]) == (3, "ab", None)
    assert (
        (tmp_path / "b" / "c.csv").read_text("utf-8").startswith("file_name,text,score,candidates,width,sha256,none\n")
    )
    (cells,) = read_csv(tmp_path / "b" / "c.csv")
    assert json.loads(cells["candidates"]) == candidates
    assert (cells["width"], cells["sha256"], cells["none"]) == ("3", "ab", "")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@settings(deadline=None)
@given(pairs=st.lists(st.tuples(any_names, texts), max_size=6, unique_by=lambda pair: pair[0]))
def test_names_and_texts_are_read_back_as_written(suffix: str, pairs: list[tuple[bytes, str]]) -> None:
    texts = {os.fsdecode(raw): text for raw, text in pairs}
    with memory_folder() as folder:
        out = folder / f"captions.{suffix}"
        run(texts, SinkOptions(str(out)), caption=lambda name: Caption(name, (Candidate(texts[name], -1.0),)))
        read = read_csv(out) if suffix == "csv" else rows(out)
        assert [(name_in(row), row["text"]) for row in read] == pairs
        if suffix == "jsonl":
            assert out.read_bytes().count(b"\n") == len(pairs)
            assert ["file_name_bytes" in row for row in read] == [not is_text(os.fsdecode(raw)) for raw, _ in pairs]
        with open_sink(SinkOptions(str(out)), print) as sink:
            assert sink.old_captions == len(pairs)
            assert not any(sink.wanted(Entry(name, name)) for name in texts)
            assert sink.wanted(Entry("another name", ""))


def test_names_that_print_alike_are_different_images(tmp_path: Path) -> None:
    names = ["\udce8.jpg", "\udce9.jpg", "\ufffd.jpg"]
    for out in (tmp_path / "a" / "c.jsonl", tmp_path / "b" / "c.csv"):
        run(names, SinkOptions(str(out)))
        before = out.read_bytes()
        assert before.count(b"-0.25") == 3
        run(names, SinkOptions(str(out)))
        assert out.read_bytes() == before


def test_csv_gains_a_column_for_names_that_are_not_utf8_once(tmp_path: Path) -> None:
    out = tmp_path / "captions.csv"
    run(["a", 'b\n"'], SinkOptions(str(out)))
    assert read_csv(out)[1] == {"file_name": 'b\n"', "text": 'a picture of b\n"', "score": "-0.25"}
    out.chmod(0o640)
    run(["a", "\udcff", "c"], SinkOptions(str(out)))
    assert [row["file_name_bytes"] for row in read_csv(out)] == ["", "", "/w==", ""]
    assert out.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.csv", "captions.run.json"]


def test_a_score_that_is_not_finite_is_null(tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    run(["a"], SinkOptions(str(out)), caption=lambda name: Caption(name, (Candidate("x", float("nan")),)))
    assert rows(out)[0]["score"] is None


def test_a_name_listed_twice_gives_one_row(tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    run(["a", "a", "b", "a", "b"], SinkOptions(str(out)))
    assert [row["file_name"] for row in rows(out)] == ["a", "b"]


def broken(name: str) -> Caption | Failure:
    return Failure(name, "unreadable", f"cannot read {name}") if name.startswith("bad") else caption_of(name)


def test_failures_are_recorded_until_the_image_is_captioned(tmp_path: Path) -> None:
    out, failures = tmp_path / "captions.jsonl", tmp_path / "captions.failures.jsonl"
    names = ["a", "bad1", "b", "bad\udcff", "bad3"]
    assert run(names, SinkOptions(str(out)), caption=broken).failures_on_record == 3
    assert rows(failures)[0] == {"file_name": "bad1", "error": "unreadable", "message": "cannot read bad1"}
    assert rows(failures)[1]["file_name_bytes"] == base64.b64encode(b"bad\xff").decode()

    sink = run(names, SinkOptions(str(out)))
    assert (sink.old_captions, sink.old_failures, sink.failures_on_record) == (2, 3, 3)

    def again(name: str) -> Caption | Failure:
        return caption_of(name) if name == "bad1" else Failure(name, "other", "still broken")

    sink = run(names, SinkOptions(str(out), retry_failed=True), caption=again)
    assert sink.failures_on_record == 2
    assert [(row["file_name"], row["message"]) for row in rows(failures)] == [
        ("bad\ufffd", "still broken"),
        ("bad3", "still broken"),
    ]
    assert run(names, SinkOptions(str(out), retry_failed=True)).failures_on_record == 0
    assert not failures.exists()
    assert [row["file_name"] for row in rows(out)] == ["a", "b", "bad1", "bad\ufffd", "bad3"]


def test_overwrite_starts_all_files_from_scratch(tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    run(["a", "bad"], SinkOptions(str(out)), caption=broken, data={"settings": {"v": 1}})
    sink = run(["c"], SinkOptions(str(out), overwrite=True), data={"settings": {"v": 2}})
    assert (sink.run_file, sink.old_captions, sink.old_failures) == (None, 0, 0)
    assert [row["file_name"] for row in rows(out)] == ["c"]
    assert json.loads((tmp_path / "captions.run.json").read_text())["settings"] == {"v": 2}
    assert not (tmp_path / "captions.failures.jsonl").exists()


def test_the_run_file_of_an_earlier_run_is_read(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "captions.csv"
    data = {"settings": {"prompt": "ü"}, "source": "/x/\udcff"}
    assert run(["a"], SinkOptions(str(out)), data=data).run_file is None
    with open_sink(SinkOptions(str(out)), print) as sink:
        assert sink.run_file == RunFile({**data, "state": "finished", "output": "captions.csv"})


def test_nothing_changes_before_begin(tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    run(["a", "bad"], SinkOptions(str(out)), caption=broken)
    for path in (out, tmp_path / "captions.failures.jsonl"):
        with path.open("ab") as stream:
            stream.write(b'{"file_na')
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for options in (SinkOptions(str(out)), SinkOptions(str(out), overwrite=True)):
        open_sink(options, print).close()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left
    open_sink(SinkOptions(str(tmp_path / "new" / "x.jsonl")), print).close()
    assert not (tmp_path / "new").exists()


def test_the_difference_of_settings_names_each() -> None:
    old = {"num_beams": 4, "prompt": None, "stop": [1], "search": {"a": 1, "b": 2}, "gone": "x", "early": True}
    new = {"num_beams": 1, "prompt": "a photo of", "stop": (1,), "search": {"a": 1, "b": 3}, "early": 1}
    assert difference(old, new) == [
        "num_beams was 4, is now 1",
        'prompt was null, is now "a photo of"',
        "search.b was 2, is now 3",
        "early was true, is now 1",
        'gone was "x", is now not set',
    ]
    assert difference(old, old) == []


def test_a_run_file_without_keys_of_later_versions_is_read() -> None:
    old = RunFile({"settings": None, "shapes": {"slots": "many"}})
    assert (old.dtype, old.threads, old.folder, old.batch_size, old.shapes) == (None,) * 5
    assert (old.gpu_decode, old.finished, old.device) == (False, False, "")
    assert RunFile({"shapes": {"slots": 8, "chunk": 2}}).shapes == (8, 2, 1)
    with pytest.raises(
        UsageError, match=r"c.jsonl was started with other settings: dtype was not set, is now \"int8\""
    ):
        old.refuse_other_settings(RunFile({"settings": {"dtype": "int8"}}), "c.jsonl")


def test_outputs_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    for options, message in [
        (SinkOptions("folder.csv"), "is a folder"),
        (SinkOptions("no/", format="csv"), "is a folder"),
        (SinkOptions("file/x.csv"), "is not a folder"),
        (SinkOptions("/dev/null", format="csv"), "not a regular file"),
        (SinkOptions("captions.parquet"), "name it .jsonl or .csv"),
        (SinkOptions("x.jsonl", failures="x.jsonl"), "different names"),
        (SinkOptions(sidecar_dir="x"), "--sidecar-dir"),
    ]:
        with pytest.raises(UsageError, match=message):
            open_sink(options, print)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"hello", "line 1: it does not end with a line break"),
        ("x.jsonl", b"hello\n", "line 1: it is not a JSON object"),
        ("x.jsonl", b"hello\nyou\n", "line 1: it is not a JSON object"),
        ("x.jsonl", b'{"id": 1, "caption": "x"}\n', "no text 'file_name', it has 'id', 'caption'"),
        ("x.jsonl", b'{"file_name": "a", "caption": "x"}\n', "no text 'text'"),
        ("x.jsonl", b"[1]\n[2]\n", "not a JSON object"),
        ("x.csv", b"image,caption\n", "its columns are 'image,caption', not 'file_name,text,score'"),
        ("x.csv", b"file_name,text,score,width\na,b,1,2\n", "its columns are 'file_name,text,score,width'"),
        ("x.csv", b"file_name,text,score\r\n", "its columns are"),
        ("x.csv", b"\x89PNG", "its columns are"),
    ],
)
def test_a_file_that_capcli_did_not_write_is_left_unchanged(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        open_sink(SinkOptions(str(tmp_path / name)), print)
    assert (tmp_path / name).read_bytes() == content


def test_rows_without_a_run_file_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    out.write_text('{"file_name": "a", "text": "b"}\n')
    with pytest.raises(UsageError, match=r"captions\.run\.json.*is missing.*--overwrite"):
        open_sink(SinkOptions(str(out)), print)
    run(["c"], SinkOptions(str(out), overwrite=True))
    assert [row["file_name"] for row in rows(out)] == ["c"]


def test_two_outputs_of_the_same_stem_have_files_of_their_own(tmp_path: Path) -> None:
    for _ in range(2):
        for version, name in enumerate(("captions.jsonl", "captions.csv")):
            data = {"settings": {"v": version}}
            sink = run(["a", "bad"], SinkOptions(str(tmp_path / name)), caption=broken, data=data)
            assert sink.run_file is None or sink.run_file.settings == data["settings"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("captions.csv", "captions.csv.failures.jsonl", "captions.csv.run.json"),
        *("captions.failures.jsonl", "captions.jsonl", "captions.run.json"),
    ]
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "captions.run.json").unlink()
    assert run(["a", "b"], SinkOptions(str(tmp_path / "captions.csv"))).captions == 2


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    out = tmp_path / "captions.csv"
    out.symlink_to("real/rows.csv")
    run(["a", "\udcff"], SinkOptions(str(out)))
    assert out.is_symlink()
    assert len(read_csv(tmp_path / "real" / "rows.csv")) == 2


def test_sidecars_are_written_beside_images(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("by hand")
    options = SinkOptions(sidecar=".txt")
    captioned: list[str] = []

    def caption(name: str) -> Caption:
        captioned.append(name)
        return Caption(name, (Candidate(f"a\n{name}", -1.0),))

    run(["a.jpg", "b.jpg", "a.png", "c", "d.txt"], options, caption=caption, folder=tmp_path)
    assert captioned == ["a.jpg", "c", "d.txt"]  # a.png has failed already
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"a.txt": "a a.jpg\n", "b.txt": "by hand", "c.txt": "a c\n", "d.txt.txt": "a d.txt\n"}
    run(["a.jpg", "c"], options, caption=caption, folder=tmp_path)
    assert len(captioned) == 3


def test_existing_sidecars_are_overwritten_or_appended_to(tmp_path: Path) -> None:
    (tmp_path / "a.caption").write_text("by hand")
    warnings: list[str] = []
    options = SinkOptions(sidecar=".caption", existing="append", candidates=True)
    for _ in range(2):
        run(["a.jpg", "a.png"], options, caption=lambda n: caption_of(n, count=2), folder=tmp_path, warnings=warnings)
    assert (tmp_path / "a.caption").read_text() == "by hand, a picture of a.jpg, a picture of a.jpg again\n"
    assert warnings[0].startswith("a.png: no text file written")
    assert len(warnings) == 2
    run(["a.jpg"], SinkOptions(sidecar=".caption", existing="overwrite"), folder=tmp_path)
    assert (tmp_path / "a.caption").read_text() == "a picture of a.jpg\n"


@pytest.mark.parametrize("name", ["/etc/x.jpg", "../../x.jpg", "a/../../x.jpg", "./x.jpg"])
def test_sidecars_in_a_folder_of_their_own_never_leave_it(tmp_path: Path, name: str) -> None:
    run([name], SinkOptions(sidecar=".txt", sidecar_dir=str(tmp_path / "in" / "side")))
    (written,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written.is_relative_to(tmp_path / "in" / "side")
    assert written.name == "x.txt"


def test_an_image_that_shares_a_sidecar_still_has_its_row(tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    run(["a.jpg", "a.png"], SinkOptions(str(out), sidecar=".txt", existing="overwrite"), folder=tmp_path)
    assert [row["file_name"] for row in rows(out)] == ["a.jpg", "a.png"]
    assert (tmp_path / "a.txt").read_text() == "a picture of a.jpg\n"


def test_an_image_without_a_sidecar_of_its_own_gives_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    run(["a.jpg", "a.png"], SinkOptions(sidecar=".txt"), warnings=warnings, folder=tmp_path)
    assert len(warnings) == 1
    assert warnings[0].startswith("a.png: no text file written")


def test_rows_go_to_standard_output_and_failures_to_warnings(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    warnings: list[str] = []
    sink = run(["a", "bad\x1b[2J", "a"], SinkOptions(), caption=broken, warnings=warnings)
    assert capfdbinary.readouterr().out.splitlines() == [
        b'{"file_name": "a", "text": "a picture of a", "score": -0.25}',
        b'{"file_name": "a", "text": "a picture of a", "score": -0.25}',
    ]
    assert warnings == ["bad\\x1b[2J: cannot read bad\\x1b[2J"]
    assert sink.failures_on_record == 1
    run(["a", "\udcff"], SinkOptions("-", format="csv"), warnings=warnings)
    assert capfdbinary.readouterr().out.decode().splitlines() == [
        "file_name,text,score",
        "a,a picture of a,-0.25",
        "\ufffd,a picture of ?,-0.25",
    ]
    assert "cannot represent this name's bytes" in warnings[-1]


def test_rows_on_standard_output_can_have_a_file_of_failures(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    failures = tmp_path / "failures.jsonl"
    options = SinkOptions(failures=str(failures))
    run(["a", "bad1", "bad2"], options, caption=broken)
    run(["a", "bad1", "bad2"], options, caption=lambda name: caption_of(name) if name == "bad1" else broken(name))
    assert [row["file_name"] for row in rows(failures)] == ["bad2"]
    assert len(capfdbinary.readouterr().out.splitlines()) == 3


@given(st.text())
def test_printable_text_has_no_control_characters(text: str) -> None:
    assert not any(ord(char) < 32 or 126 < ord(char) < 160 or char in "\u202e\u2028" for char in printable(text))


def test_damage_in_the_middle_of_a_file_is_reported_and_unchanged(tmp_path: Path) -> None:
    names = [f"{n}\n.jpg" for n in range(5)]
    for suffix, line in (("jsonl", 3), ("csv", 8)):
        out = tmp_path / f"{suffix}.{suffix}"
        run(names, SinkOptions(str(out)))
        whole = out.read_bytes()
        for damage in (b"", b"\0", b"\xff", b"x\n", b'""'):
            out.write_bytes(whole.replace(b'2\\n.jpg"' if suffix == "jsonl" else b'"2\n', damage, 1))
            damaged = out.read_bytes()
            with pytest.raises(CapcliError, match=rf"line {line} is damaged: .*Repair or delete that line"):
                open_sink(SinkOptions(str(out)), print)
            assert out.read_bytes() == damaged
