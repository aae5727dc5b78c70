"""The real command and what people's files do to its outputs: every listed image has one row or one failure."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from running import call, ended, execute, paint, size, spawn, wait_until
from sinking import memory_folder

from capcli.storage import atomic, locks


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(path: Path) -> list[str]:
    return [row["file_name"] for row in rows(path)]


def captions(folder: Path) -> dict[str, str]:
    return {row["file_name"]: row["text"] for row in rows(folder / "c.jsonl")}


def failures(folder: Path) -> dict[str, str]:
    return {row["file_name"]: row["error"] for row in rows(folder / "c.failures.jsonl")}


def unlistable(folder: Path) -> None:
    """Folders below `folder` that nobody can list, root neither: their path is longer than the system allows."""
    here = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(25):
            os.mkdir("d" * 200, dir_fd=here)
            below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
    finally:
        os.close(here)


def test_an_unwritable_text_file_is_the_failure_of_its_image(captioner: Path, tmp_path: Path) -> None:
    photos = paint(tmp_path / "p", "a" * 251 + ".png", "b.png", "c.png", "d.png")
    (photos / "c.caption").mkdir()
    for arguments in (["-o", tmp_path / "c.jsonl"], []):
        for again in (False, True):
            run = call("caption", photos, "-m", captioner, "--sidecar", ".caption", *arguments)
            assert run.code == 3, run.err
            assert arguments or again or run.err.count("cannot write the text file") == 2
        assert [path.stem for path in sorted(photos.glob("*.caption"))] == ["b", "c", "d"]
    assert set(captions(tmp_path)) == {"b.png", "d.png"}
    assert failures(tmp_path) == {"a" * 251 + ".png": "sidecar", "c.png": "sidecar"}


@pytest.mark.parametrize(
    "link",
    [
        *("c.run.json.tmp", "c.jsonl.tmp", ".capcli-1-1.tmp", ".capcli-00.tmp", "c.run.json", "c.failures.jsonl"),
        *("c.images.bin", "b.txt", "a.txt"),
    ],
)
def test_no_link_in_a_folder_of_photos_is_followed(captioner: Path, tmp_path: Path, link: str) -> None:
    photos = paint(tmp_path / "p", "a.png", "b.png")
    (photos / "broken.png").write_bytes(b"no picture")
    (tmp_path / "victim").write_text("precious")
    (photos / link).symlink_to("../victim")
    command = ["caption", photos, "-m", captioner, "-o", photos / "c.jsonl", "--sidecar", ".txt"]
    assert call(*command, "--existing", "overwrite").code == 3
    assert call(*command, "--existing", "append").code == 3
    assert (tmp_path / "victim").read_text() == "precious"
    assert sorted(captions(photos)) == ["a.png", "b.png"]


def test_an_out_that_is_a_link_is_written_through(captioner: Path, tmp_path: Path) -> None:
    photos = paint(tmp_path / "p", "a.png")
    (tmp_path / "real").mkdir()
    (tmp_path / "c.jsonl").symlink_to("real/rows.jsonl")
    assert call("caption", photos, "-m", captioner, "-o", tmp_path / "c.jsonl").code == 0
    assert (tmp_path / "c.jsonl").is_symlink()
    assert names(tmp_path / "real" / "rows.jsonl") == ["a.png"]


def test_temporary_files_of_killed_runs_are_removed_and_no_others(captioner: Path, tmp_path: Path) -> None:
    photos, out = paint(tmp_path / "p", "a.png", "s/b.png"), tmp_path / "o" / "c.jsonl"
    out.parent.mkdir()
    left = [folder / f".capcli-0123456789abcde{n}.tmp" for n, folder in enumerate((photos, photos / "s", out.parent))]
    kept = [
        photos / ".capcli-mine.tmp",
        photos / ".capcli-00.tmp",
        photos / ".capcli-11.tmp",
        photos / ".capcli-22.tmp",
    ]
    for path in (*left, kept[0], kept[3]):
        path.write_text("half")
    kept[1].mkdir()
    os.mkfifo(kept[2])
    written = os.open(kept[3], os.O_RDWR)  # by a run that is alive
    assert locks.take(written)
    (photos / "a.txt").write_text("by hand")
    (photos / "s" / "b.txt").write_text("by hand")
    assert call("caption", photos, "-m", captioner, "--sidecar", ".txt").code == 0
    assert call("caption", photos, "-m", captioner, "-o", out).code == 0
    os.close(written)
    assert [path for path in left if path.exists()] == []
    assert all(os.path.lexists(path) for path in kept)


def test_a_temporary_file_is_created_exclusively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".capcli-{'00' * 8}.tmp").symlink_to("victim")
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda count: "00" * count)
    with pytest.raises(FileExistsError):
        atomic.replace(str(tmp_path / "x"), [b"new"])
    assert (tmp_path / "victim").read_text() == "precious"


def test_rows_lost_to_a_power_cut_come_back_though_their_text_files_are_there(captioner: Path, tmp_path: Path) -> None:
    photos, out = paint(tmp_path / "p", *(f"{n}.png" for n in range(4))), tmp_path / "c.jsonl"
    command = ["caption", photos, "-m", captioner, "--sidecar", ".txt", "-o", out]
    assert call(*command).code == 0
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) * 2 // 3] + b"\0" * 9)
    assert call(*command).code == 0
    assert out.read_bytes() == whole


def test_images_of_one_stem_have_a_row_each_or_a_failure(captioner: Path, tmp_path: Path) -> None:
    photos = paint(tmp_path / "p", "b.jpg", "b.png")
    command = ["caption", photos, "-m", captioner, "--sidecar", ".txt"]
    run = call(*command, "-o", tmp_path / "c.jsonl")
    assert run.code == 0
    assert "b.png: no text file written" in run.err
    assert list(captions(tmp_path)) == ["b.jpg", "b.png"]
    assert (photos / "b.txt").read_text() == captions(tmp_path)["b.jpg"] + "\n"
    only = call(*command, "--existing", "overwrite")
    assert only.code == 3
    assert only.err.count("b.png: no text file written") == 1
    assert "1 captioned, 0 skipped, 1 failed" in only.err
    same = call("caption", photos / "b.jpg", f"{photos}/../p/b.jpg", "-m", captioner, "--sidecar", ".txt")
    assert same.code == 0  # one image under two names


def test_a_folder_that_cannot_be_listed_is_on_record_until_it_can_be(
    captioner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, out = paint(tmp_path / "p", "a.png", "locked/b.png", "s/c.png"), tmp_path / "c.jsonl"
    scandir, command = os.scandir, ["caption", photos, "-m", captioner, "-o", out]

    def refusing(path: str) -> object:
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refusing)
        for _ in range(2):
            assert call(*command).code == 3
            assert failures(tmp_path) == {"locked/": "unlisted"}
        listed = call("caption", photos, "-m", captioner, "--dry-run")
        assert listed.code == 3
        assert "locked/: the folder cannot be listed: Permission denied" in listed.err
    assert call(*command).code == 0
    assert failures(tmp_path) == {}
    assert len(captions(tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_stops_when_its_captions_are_removed(captioner: Path, tmp_path: Path, replaced: bool) -> None:
    photos, out = paint(tmp_path / "p", *(f"{n}.png" for n in range(60))), tmp_path / "c.jsonl"
    slow = ["--batch-size", 1, "--threads", 1, "--max-new-tokens", 50]
    process = spawn("caption", photos, "-m", captioner, "-o", out, *slow)
    wait_until(lambda: size(out) > 0, process)
    out.unlink()
    if replaced:
        out.write_text("another program's")
    run = ended(process)
    assert run.code == 1
    assert f"{out} was removed or replaced while this run wrote to it" in run.err
    assert json.loads((tmp_path / "c.run.json").read_text())["state"] == "running"
    assert not replaced or out.read_text() == "another program's"


def test_text_files_that_exist_do_not_keep_an_image_from_its_row(captioner: Path, tmp_path: Path) -> None:
    photos = paint(tmp_path / "p", "a.png", "b.png", "c.png")
    (photos / "a.txt").write_text("by hand")
    (photos / "b.txt").write_text("")
    (photos / "c.txt").write_bytes(b"\xef\xbb\xbf")
    command = ["caption", photos, "-m", captioner, "--sidecar", ".txt"]
    assert call(*command, "-o", tmp_path / "c.jsonl").code == 0
    found = captions(tmp_path)
    assert list(found) == ["a.png", "b.png", "c.png"]
    texts = [(photos / f"{stem}.txt").read_text() for stem in "abc"]
    assert texts == ["by hand", found["b.png"] + "\n", found["c.png"] + "\n"]
    assert "0 captioned, 3 skipped" in call(*command).err


def test_a_caption_is_appended_to_the_first_line(captioner: Path, tmp_path: Path) -> None:
    stems = "abcdef"
    photos = paint(tmp_path / "p", *(f"{stem}.png" for stem in stems))
    before = [b"by hand", b"by hand\r\nmore\r\n", b"\n", b"\xff\xfet\0a\0g\0", b"\nsecond line\n", b"bl\xe4u"]
    for stem, content in zip(stems, before, strict=True):
        (photos / f"{stem}.txt").write_bytes(content)
    command = ["caption", photos, "-m", captioner, "--sidecar", ".txt", "--existing", "append", "--separator", " | "]
    assert call(*command, "-o", tmp_path / "c.jsonl").code == 3
    found = {name[0]: text.encode() for name, text in captions(tmp_path).items()}
    assert failures(tmp_path)["d.png"] == "sidecar"
    expected = [b"by hand | %b\n", b"by hand | %b\r\nmore\r\n", b"%b\n", None, b"%b\nsecond line\n", b"bl\xe4u | %b\n"]
    for stem, content, pattern in zip(stems, before, expected, strict=True):
        whole = pattern % found[stem] if pattern and stem in found else content
        assert (photos / f"{stem}.txt").read_bytes() == whole
    (tmp_path / "c.jsonl").unlink()
    assert call(*command, "-o", tmp_path / "c.jsonl").code == 3
    assert (photos / "a.txt").read_bytes() == b"by hand | %b\n" % found["a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--existing", "overwrite"], "--existing has no effect without --sidecar"),
        (["--sidecar", ".txt", "--separator", ";"], "--separator has no effect without --existing append"),
        (["--refresh"], "--refresh compares the images with the captions of earlier runs"),
        (["--prune"], "name their file with --out"),
    ],
)
def test_options_without_effect_are_wrong_usage(tmp_path: Path, options: list[str], message: str) -> None:
    refused = call("caption", tmp_path, "-m", "./nosuch", *options)
    assert refused.code == 2
    assert message in refused.err


def test_captions_of_one_stem_in_two_formats_go_on_side_by_side(captioner: Path, tmp_path: Path) -> None:
    photos = paint(tmp_path / "p", "a.png", "b.png")
    (photos / "broken.png").write_bytes(b"no picture")
    for limit in (1, None):
        for suffix, beams in (("jsonl", 1), ("csv", 2)):
            limited = [] if limit is None else ["--limit", limit]
            out = tmp_path / f"c.{suffix}"
            assert call("caption", photos, "-m", captioner, "-o", out, "--num-beams", beams, *limited).code in (0, 3)
    assert list(captions(tmp_path)) == ["a.png", "b.png"]
    with (tmp_path / "c.csv").open() as file:
        assert [row["file_name"] for row in csv.DictReader(file)] == ["a.png", "b.png"]
    assert names(tmp_path / "c.failures.jsonl") == names(tmp_path / "c.csv.failures.jsonl") == ["broken.png"]
    assert json.loads((tmp_path / "c.csv.run.json").read_text())["settings"]["generation"]["num_beams"] == 2


def test_changed_images_are_captioned_again_in_their_place(captioner: Path, tmp_path: Path) -> None:
    photos, out = paint(tmp_path / "p", *(f"{n}.png" for n in range(5))), tmp_path / "c.jsonl"
    command = ["caption", photos, "-m", captioner, "-o", out]
    assert call(*command).code == 0
    before = captions(tmp_path)
    paint(photos, "other.png", seed=7)
    os.replace(photos / "other.png", photos / "1.png")
    os.utime(photos / "2.png")  # another time, the same content
    (photos / "3.png").write_bytes(b"no picture any more")
    assert "0 captioned, 5 skipped" in call(*command).err
    assert captions(tmp_path) == before
    listed = call(*command, "--refresh", "--dry-run")
    assert listed.out.decode().split() == ["1.png", "3.png"]
    run = call(*command, "--refresh")
    assert run.code == 3
    assert "1 captioned, 3 skipped, 1 failed" in run.err
    assert "2 changed images tried again" in run.err
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert call(*command[:-1], fresh / "c.jsonl").code == 3
    assert captions(tmp_path) == captions(fresh)
    assert list(captions(tmp_path)) == ["0.png", "1.png", "2.png", "4.png"]
    assert failures(tmp_path) == {"3.png": "unknown-format"}
    assert json.loads((tmp_path / "c.run.json").read_text())["counts"] == {"captions": 4, "failures": 1}
    assert "0 changed images" in call(*command, "--refresh").err.replace("1 changed image ", "0 changed images ")
    assert size(tmp_path / "c.images.bin") == 32 * 5


def test_captions_without_a_record_of_their_images_are_compared_by_time(captioner: Path, tmp_path: Path) -> None:
    photos, out = paint(tmp_path / "p", "a.png", "b.png"), tmp_path / "c.jsonl"
    for path in photos.iterdir():
        os.utime(path, (1e9, 1e9))
    command = ["caption", photos, "-m", captioner, "-o", out]
    assert call(*command).code == 0
    (tmp_path / "c.images.bin").unlink()  # as earlier versions left it
    os.utime(photos / "b.png", (time.time() + 9, time.time() + 9))
    assert "1 changed image tried again" in call(*command, "--refresh").err
    assert "0 changed images tried again" in call(*command, "--refresh").err


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_rows_of_images_that_are_gone_are_dropped(captioner: Path, tmp_path: Path, suffix: str) -> None:
    photos, other = paint(tmp_path / "p", "a.png", "b.png", "s/c.png"), paint(tmp_path / "q", "d.png", seed=3)
    (photos / "broken.png").write_bytes(b"no picture")
    out = tmp_path / f"c.{suffix}"
    command = ["caption", "-m", captioner, "-o", out, photos]
    assert call(*command, other).code == 3
    (photos / "a.png").rename(photos / "new.png")
    shutil.rmtree(photos / "s")
    (photos / "broken.png").unlink()
    shutil.rmtree(other)  # which is not searched by the next command
    run = call(*command, "--prune")
    assert run.code == 0
    assert "3 rows of images that are gone dropped" in run.err
    if suffix == "csv":
        with out.open() as file:
            found = [Path(row["file_name"]).name for row in csv.DictReader(file)]
    else:
        found = [Path(name).name for name in names(out)]
    assert found == ["b.png", "d.png", "new.png"]
    shutil.rmtree(photos)
    photos.mkdir()  # as a disk that is not mounted
    before = out.read_bytes()
    assert call(*command, "--prune").code == 2
    assert out.read_bytes() == before


def test_all_names_of_a_file_are_relative_to_its_first_folder(captioner: Path, tmp_path: Path) -> None:
    first, second = paint(tmp_path / "p", "x.png", "s/y.png"), paint(tmp_path / "q", "x.png", seed=2)
    out = tmp_path / "c.jsonl"
    command = ["caption", "-m", captioner, "-o", out]
    assert call(*command, first).code == 0
    assert "1 captioned, 2 skipped" in call(*command, first, second).err
    listed = tmp_path / "list"
    listed.write_text(f"{second}/x.png\n{first}/s/y.png\n{first}/s/../x.png\n")
    assert "0 captioned, 3 skipped" in call(*command, "--from-file", listed).err
    assert "0 captioned, 1 skipped" in execute(*command, "x.png", cwd=second).err
    assert names(out) == ["s/y.png", "x.png", "../q/x.png"]


def test_csv_for_spreadsheets_has_a_mark_and_no_formula(captioner: Path, tmp_path: Path) -> None:
    odd = ["=1+1.png", "'=x.png", "@a.png", "-b.png", "plain.png", "ü.png"]
    photos, out = paint(tmp_path / "p", *odd), tmp_path / "c.csv"
    command = ["caption", photos, "-m", captioner, "-o", out, "--format", "csv-excel"]
    for limit in (2, 9):
        assert call(*command, "--limit", limit).code == 0
    assert "0 captioned, 6 skipped" in call(*command).err
    assert out.read_bytes().startswith(b"\xef\xbb\xbffile_name,text,score\n")
    with out.open(encoding="utf-8-sig", newline="") as file:
        found = list(csv.DictReader(file))
    assert sorted(row["file_name"] for row in found) == sorted(
        ["'=1+1.png", "''=x.png", "'@a.png", "'-b.png", "plain.png", "ü.png"]
    )
    assert all(float(row["score"]) < 0 for row in found)


FAULTS_BEFORE = {
    "stems": lambda photos: paint(photos, "0/2.jpg", "1/3.webp", seed=2),
    "unlistable": lambda photos: unlistable(photos / "1"),
    "text folder": lambda photos: (photos / "0" / "4.txt").mkdir(),
    "broken": lambda photos: (photos / "1" / "5.png").write_bytes(b"no picture"),
    "long name": lambda photos: paint(photos, "0/" + "n" * 251 + ".jpe"),
    "link to text": lambda photos: (photos / "0" / "6.txt").symlink_to("../1/1.png"),
    "link to run file": lambda photos: (photos / "../c.run.json").symlink_to("p/1/1.png"),
    "link to failures": lambda photos: (photos / "../c.failures.jsonl").symlink_to("p/1/1.png"),
}
FAULTS_AFTER = {
    "torn": lambda out: os.truncate(out, size(out) * 5 // 7),
    "zeros": lambda out: out.write_bytes(out.read_bytes() + bytes(99)),
    "vanished": lambda out: (out.parent / "p" / "0" / "8.png").unlink(),
    "text lost": lambda out: (out.parent / "p" / "1" / "7.txt").unlink(missing_ok=True),
}


def killed(command: list[Any], out: Path, least: int) -> None:
    process = spawn(*command)
    while process.poll() is None and size(out) <= least:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    ended(process)


@settings(deadline=None, max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    before=st.sets(st.sampled_from(sorted(FAULTS_BEFORE)), max_size=5),
    after=st.sets(st.sampled_from(sorted(FAULTS_AFTER)), max_size=3),
    kill=st.one_of(st.none(), st.integers(0, 600)),
    suffix=st.sampled_from(["jsonl", "csv"]),
)
def test_every_listed_image_has_one_row_or_one_failure(
    captioner: Path, before: set[str], after: set[str], kill: int | None, suffix: str
) -> None:
    with memory_folder() as place:
        photos, out = paint(place / "p", *(f"{n % 2}/{n}.png" for n in range(10)), seed=1), place / f"c.{suffix}"
        for fault in sorted(before):
            FAULTS_BEFORE[fault](photos)
        whole = (photos / "1" / "1.png").read_bytes()
        command = ["caption", photos, "-m", captioner, "-o", out, "--sidecar", ".txt", "--threads", 1]
        call(*command) if kill is None else killed([*command, "--batch-size", 2], out, kill)
        for fault in sorted(after):
            if out.exists():
                FAULTS_AFTER[fault](out)
        run = call(*command, "--prune")
        listed = [str(path.relative_to(photos)) for path in photos.glob("[01]/*.*") if path.suffix != ".txt"]
        assert out.exists(), run.err
        with out.open(newline="") as file:
            found = csv.DictReader(file) if suffix == "csv" else map(json.loads, file)
            captioned = [row["file_name"] for row in found]
        recorded = place / "c.failures.jsonl"
        failed = [] if recorded.is_symlink() else names(recorded)  # the first failure replaces the link
        assert sorted(captioned + [name for name in failed if not name.endswith("/")]) == sorted(listed)
        assert any(name.endswith("/") for name in failed) == ("unlistable" in before)
        assert run.code == (3 if failed else 0), run.err
        assert (photos / "1" / "1.png").read_bytes() == whole
        assert [path for pattern in (".capcli-*", "p/*/.capcli-*") for path in place.glob(pattern)] == []
        shutil.rmtree(place, ignore_errors=True)


def on_terminal(*arguments: object) -> bytes:
    """What the command writes to standard output and error where both are a terminal."""
    main, terminal = pty.openpty()
    process = spawn(*arguments, stdout=terminal, stderr=terminal)
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(main, 1 << 16):
            written += chunk
    os.close(main)
    process.wait()
    return written


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ["-o", "-", "--format", "jsonl"], ["-o", "-", "--format", "csv"]])
def test_names_cannot_control_a_terminal(captioner: Path, tmp_path: Path, form: list[str]) -> None:
    photos = paint(tmp_path / "p", "\x1b[31mred\x9b5m.png", "\x9d0;title\x07.png")
    (photos / "\x1b[2Jbroken.png").write_bytes(b"no picture")
    written = on_terminal("caption", photos, "-m", captioner, "--quiet", *form).decode()
    assert "red" in written
    assert "broken" in written
    assert not {"\x9b", "\x9d", "\x07"} & set(written)
    assert "\x1b[31m" not in written
    assert "\x1b[2J" not in written
    piped = call("caption", photos, "-m", captioner, "--quiet", *form).out.decode()
    assert "\x9b" in piped
    refused = on_terminal("caption", tmp_path / "\x1b[31mgone").decode()
    assert "gone: no file" in refused
    assert "\x1b[31m" not in refused
