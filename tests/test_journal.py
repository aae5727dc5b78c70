"""Sinks after a kill, a power failure or a full disk, and with a second run: a later run can always continue."""

from __future__ import annotations

import base64
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sinking import caption_of, memory_folder, rows, run

from capcli.errors import CapcliError
from capcli.options import SinkOptions
from capcli.records import Candidate, Caption, Entry, Failure
from capcli.sinks import open_sink, row_files
from capcli.sinks.keys import Keys, key
from capcli.sinks.row_formats import JsonCaptions, RowFields
from capcli.storage.run_file import RunFile
from capcli.text import raw_bytes

ODD = [
    "a.jpg",
    'q"uo"te, b.jpg',
    "new\nline\r\n.jpg",
    "ü\u2028€.jpg",
    "bytes\udce9.jpg",
    '"',
    "\n",
    "z\udcff\n,.jpg",
    "end",
]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(autouse=True)
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts calls of fsync and skips them: what the operating system has outlives a killed process without them."""
    counted: list[int] = []
    monkeypatch.setattr(os, "fsync", counted.append)
    return counted


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".run.json")}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"captions.{suffix}"
    options = SinkOptions(str(out), candidates=suffix == "csv", fields=("width",))

    def caption(name: str) -> Caption:
        return caption_of(name, '"{}", ü\n\t', width=3)

    run(ODD, options, caption=caption)
    whole = out.read_bytes()
    for length in range(len(whole)):
        for tail in (b"", b"\0" * 9)[: 1 + (length % 10 == 0)]:
            out.write_bytes(whole[:length] + tail)
            run(ODD, options, caption=caption)
            assert out.read_bytes() == whole, (length, tail)


@pytest.mark.parametrize("name", [b"\r,,\n", b"\n,,\n", b"\na,,\n"])
def test_a_name_with_lines_of_commas_is_not_taken_for_a_row(tmp_path: Path, name: bytes) -> None:
    out, names = tmp_path / "captions.csv", [os.fsdecode(name)]
    run(names, SinkOptions(str(out)))
    whole = out.read_bytes()
    for length in range(len(whole)):
        out.write_bytes(whole[:length])
        run(names, SinkOptions(str(out)))
        assert out.read_bytes() == whole, length


@settings(deadline=None, max_examples=40)
@given(
    suffix=st.sampled_from(["jsonl", "csv"]),
    raw=st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=9), st.text('a",\r\nü', min_size=1, max_size=6).map(str.encode)
        ).filter(lambda raw: b"\0" not in raw),
        min_size=1,
        max_size=5,
        unique=True,
    ),
    text=st.text(alphabet='a",\r\n\0\x1bü', max_size=6),
    data=st.data(),
)
def test_any_rows_cut_anywhere_are_completed(suffix: str, raw: list[bytes], text: str, data: st.DataObject) -> None:
    names = [os.fsdecode(name) for name in raw]

    def caption(name: str) -> Caption:
        return Caption(name, (Candidate(text, -0.5),))

    with memory_folder() as folder:
        out = folder / f"captions.{suffix}"
        run(names, SinkOptions(str(out)), caption=caption)
        whole = out.read_bytes()
        out.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        run(names, SinkOptions(str(out)), caption=caption)
        assert out.read_bytes() == whole


def test_failures_cut_anywhere_are_written_again(tmp_path: Path) -> None:
    out, failures = tmp_path / "captions.jsonl", tmp_path / "captions.failures.jsonl"

    def fail(name: str) -> Failure:
        return Failure(name, "broken", f"no {name}")

    run(ODD, SinkOptions(str(out)), caption=fail)
    whole = failures.read_bytes()
    for length in range(len(whole)):
        failures.write_bytes(whole[:length])
        assert run(ODD, SinkOptions(str(out)), caption=fail).failures_on_record == len(ODD)
        assert failures.read_bytes() == whole, length


def test_a_row_that_is_cut_off_gives_a_warning(tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    run(["a"], SinkOptions(str(out)))
    with out.open("ab") as stream:
        stream.write(b'{"file_name": "b"' + b"\0" * (1 << 20))
    warnings: list[str] = []
    run(["a"], SinkOptions(str(out)), warnings=warnings)
    assert warnings == [f"{out}: cut off {17 + (1 << 20)} bytes of a row that an earlier run did not complete"]


def test_an_unclosed_quote_removes_no_rows(tmp_path: Path) -> None:
    out = tmp_path / "captions.csv"
    run(["a", "b", "c"], SinkOptions(str(out)))
    damaged = out.read_bytes().replace(b"b,", b'"b,', 1)
    out.write_bytes(damaged)
    with pytest.raises(CapcliError, match="line 3 is damaged"):
        open_sink(SinkOptions(str(out)), print)
    assert out.read_bytes() == damaged


def test_a_caption_and_a_later_failure_supersede_a_failure(tmp_path: Path) -> None:
    out, failures = tmp_path / "captions.jsonl", tmp_path / "captions.failures.jsonl"
    run(["a", "b"], SinkOptions(str(out)))
    lines = [{"file_name": name, "error": "x", "message": str(n)} for n, name in enumerate(["a", "c", "d", "c", "b"])]
    failures.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sink = run([], SinkOptions(str(out)))
    assert sink.old_failures == 2
    assert [(row["file_name"], row["message"]) for row in rows(failures)] == [("d", "2"), ("c", "3")]


# Kills: a child process runs the scenario and exits at its nth system call, without any cleanup.

CALLS = ("open", "write", "ftruncate", "fsync", "replace", "unlink", "makedirs", "close", "fchmod")
KILLED = 9


def killed_at(count: int, scenario: Callable[[], object]) -> bool:
    """Run the scenario in a child that dies before its system call number `count`, or in the middle of it for a write.

    Returns False if the scenario ends before that call.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    try:
        left = iter(range(count))

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                if next(left, None) is None:
                    if call.__name__ == "write":
                        call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os._exit(KILLED)
                return call(*arguments, **options)

            return counted

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        scenario()
        os._exit(0)
    finally:
        os._exit(1)


def kills(scenario: Callable[[], object], reset: Callable[[], None]) -> Iterator[int]:
    """Yields once for each system call of the scenario, with the files as a kill at that call leaves them."""
    for count in range(1000):
        reset()
        if not killed_at(count, scenario):
            assert count > 10
            return
        yield count
    raise AssertionError("the scenario does not end")


def sometimes(name: str) -> Caption | Failure:
    return Failure(name, "broken", "no") if "bad" in name else caption_of(name)


LISTED = ["a.jpg", "bad1", "b.jpg", "a.jpg", "\udce9.jpg", "bad2", "c.jpg", "\udcff.jpg"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize(
    "more",
    [{}, {"overwrite": True}, {"sidecar": ".txt"}, {"sidecar": ".txt", "existing": "append"}],
    ids=["rows", "overwrite", "sidecars", "appended sidecars"],
)
def test_after_a_kill_at_any_system_call_the_next_run_completes_all_files(
    tmp_path: Path, suffix: str, more: dict[str, Any]
) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"

    def scenario(folder: Path) -> None:
        images = folder / "images"
        images.mkdir(exist_ok=True)
        run(LISTED, SinkOptions(str(folder / f"x.{suffix}"), **more), caption=sometimes, folder=images)

    def reset() -> None:
        shutil.rmtree(torn, ignore_errors=True)
        torn.mkdir()

    def left(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if ".tmp" not in path.name
        }

    whole.mkdir()
    scenario(whole)
    for count in kills(lambda: scenario(torn), reset):
        if count % 5 == 0:
            killed_at(count, lambda: scenario(torn))  # the next run is killed as well
        scenario(torn)
        assert left(torn) == left(whole), count


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_after_a_kill_at_any_system_call_of_a_retry_the_next_completes_it(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"x.{suffix}"
    options = SinkOptions(str(out))
    again = SinkOptions(str(out), retry_failed=True)

    def reset() -> None:
        for path in tmp_path.iterdir():
            path.unlink()
        run(LISTED, options, caption=sometimes)

    def retried(name: str) -> Caption | Failure:
        return Failure(name, "broken", "again") if name == "bad2" else caption_of(name)

    reset()
    run(LISTED, again, caption=retried)
    whole = contents(tmp_path)
    for count in kills(lambda: run(LISTED, again, caption=retried), reset):
        run(LISTED, again, caption=retried)
        assert contents(tmp_path) == whole, count


def test_a_kill_at_any_system_call_of_an_overwrite_leaves_no_mixture(tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl"

    def run_with(text: str, **options: Any) -> None:
        def caption(name: str) -> Caption | Failure:
            return Failure(name, "broken", text) if "bad" in name else Caption(name, (Candidate(text, -1.0),))

        run(LISTED, SinkOptions(str(out), **options), caption=caption, data={"settings": {"text": text}})

    def reset() -> None:
        for path in tmp_path.iterdir():
            path.unlink()
        run_with("old")

    run_with("new")
    whole = contents(tmp_path)
    for count in kills(lambda: run_with("new", overwrite=True), reset):
        with open_sink(SinkOptions(str(out)), print) as sink:
            texts = {row["text"] for row in rows(out)[: sink.old_captions]}
            failures = {row["message"] for row in rows(tmp_path / "x.failures.jsonl")}
            assert len(texts) < 2
            if sink.run_file is None:
                assert not texts | failures
            else:
                assert texts | failures <= {sink.run_file.settings["text"]}
        if count % 5 == 0:
            run_with("new", overwrite=True)
            assert contents(tmp_path) == whole, count


def test_rows_are_synced_to_disk_when_the_run_ends(tmp_path: Path, syncs: list[int]) -> None:
    with open_sink(SinkOptions(str(tmp_path / "x.jsonl")), print) as sink:
        sink.begin(RunFile({}))
        sink.write(Entry("a", "a"), caption_of("a"))
        before = len(syncs)
    assert len(syncs) == before + 1


def test_a_csv_file_stays_as_it_is_when_the_disk_is_too_full_for_another_column(tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    run(map(str, range(100)), SinkOptions(str(out)))
    before = out.read_bytes()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), len(before)))
            run(["\udcff"], SinkOptions(str(out)))
        except CapcliError as error:
            os._exit("File too large" in str(error))
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.run.json"]


def test_a_second_run_is_refused_on_each_file(tmp_path: Path) -> None:
    options = SinkOptions(str(tmp_path / "x.jsonl"))
    first, second = open_sink(options, print), open_sink(options, print)  # before either has created the file
    first.begin(RunFile({}))
    first.write(Entry("1", "1"), Failure("1", "x", "y"))
    with pytest.raises(CapcliError, match="is being written by another run: wait until it ends"):
        second.begin(RunFile({}))
    with pytest.raises(CapcliError, match="is being written by another run"):
        open_sink(options, print)
    with pytest.raises(CapcliError, match=r"failures\.jsonl is being written"):
        open_sink(SinkOptions(str(tmp_path / "y.jsonl"), failures=str(tmp_path / "x.failures.jsonl")), print)
    first.close()
    open_sink(options, print).close()


def test_a_file_that_gains_a_column_stays_locked(tmp_path: Path) -> None:
    options = SinkOptions(str(tmp_path / "x.csv"))
    with open_sink(options, print) as sink:
        sink.begin(RunFile({}))
        sink.write(Entry("\udcff", ""), caption_of("\udcff"))
        with pytest.raises(CapcliError, match="is being written by another run"):
            open_sink(options, print)
    open_sink(options, print).close()


@given(
    name=st.text(st.characters(exclude_categories=()), min_size=1, max_size=6),
    text=st.text('a", \\n{}ü', max_size=6),
    place=st.integers(0, 90),
    byte=st.one_of(st.none(), st.sampled_from(b'"\\,:{}e0-.n\n\x01\xff'), st.integers(0, 255)),
)
def test_the_name_of_a_row_is_the_one_that_a_json_parser_reads(
    name: str, text: str, place: int, byte: int | None
) -> None:
    rows = JsonCaptions(RowFields(candidates=False, fields=("width", "mode")))
    record = bytearray(rows.line(Caption(name, (Candidate(text, -0.25),), {"width": 3})))
    if byte is not None:
        record[place % len(record)] = byte
    try:
        row = json.loads(bytes(record).decode()) if record.endswith(b"\n") else None
        assert isinstance(row["file_name"], str)
        assert isinstance(row["text"], str)
        raw = base64.b64decode(row["file_name_bytes"]) if "file_name_bytes" in row else raw_bytes(row["file_name"])
    except (ValueError, TypeError, KeyError, AssertionError):
        with pytest.raises(ValueError):  # noqa: PT011
            rows.name(bytes(record))
    else:
        assert rows.name(bytes(record)) == raw


@given(st.lists(st.integers(1, 2**64 - 1)), st.lists(st.integers(1, 2**64 - 1)), st.integers(1, 2**64 - 1))
def test_keys_are_a_set(read: list[int], added: list[int], other: int) -> None:
    keys = Keys(read)
    for item in added:
        keys.add(item)
    assert len(keys) == len({*read, *added})
    assert all(item in keys for item in (*read, *added))
    assert (other in keys) == (other in {*read, *added})


def test_a_row_that_is_too_long_to_be_read_again_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SinkOptions(str(tmp_path / "x.jsonl"))

    def caption(name: str) -> Caption:
        return Caption(name, (Candidate("a" * (5 << 20 if name == "long" else 3), -1.0),))

    run(["long", "short"], options, caption=caption)
    assert run(["long", "short", "next"], options, caption=caption).old_captions == 2
    monkeypatch.setattr(row_files, "LONGEST", 1 << 20)
    assert run(["other"], options, caption=lambda name: Caption(name, caption("long").candidates)).captions == 3
    assert [row["error"] for row in rows(tmp_path / "x.failures.jsonl")] == ["too-long"]


def test_many_keys_are_a_set() -> None:
    keys = Keys(range(2, 200_000, 2))
    for item in range(3, 200_000, 3):
        keys.add(item)
    assert len(keys) == len({*range(2, 200_000, 2), *range(3, 200_000, 3)})
    assert all((item in keys) == (item % 2 == 0 or item % 3 == 0) for item in range(1, 200_000, 7))


def test_different_names_have_different_keys_and_none_is_0() -> None:
    keys = {key(b"%d.jpg" % n) for n in range(100_000)} | {key(b"")}
    assert len(keys) == 100_001
    assert all(0 < item < 2**64 for item in keys)
