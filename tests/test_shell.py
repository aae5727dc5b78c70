"""`capcli caption` among other programs: pipes, terminals, streams that are closed, and more names than fit in memory."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
from pathlib import Path

import pexpect
import pytest
from running import COMMAND, PATIENCE, ended, environment, execute, paint, shell, spawn

CLOSING = re.compile(r"\d+ captioned, \d+ skipped, \d+ failed, [\d.]+ images/s in (float32|bfloat16)\n")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("photos"), *(f"{n:03d}.png" for n in range(120)), "new\nline.png")


def next_line(process: subprocess.Popen[bytes]) -> bytes:
    """The next line on a process's standard output; the test fails when none comes."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(PATIENCE), "nothing came"
    return process.stdout.readline()


def test_a_row_comes_before_the_next_name_is_known(captioner: Path, photos: Path):
    process = spawn("caption", "-", "-m", captioner, stdin=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    for number in range(4):
        name = str(photos / f"{number:03d}.png")
        process.stdin.write(f"{name}\n".encode())
        assert json.loads(next_line(process))["file_name"] == name
    done = ended(process)
    assert (done.code, done.out) == (0, b"")
    assert CLOSING.fullmatch(done.err)


def test_an_interrupt_ends_a_run_that_waits_for_names(captioner: Path, photos: Path):
    process = spawn("caption", "-", "-m", captioner, stdin=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    process.stdin.write(os.fsencode(photos / "000.png") + b"\n")
    next_line(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 130  # while standard input is still open
    done = ended(process)
    assert "1 captioned" in done.err
    assert "Traceback" not in done.err


def test_a_reader_that_has_enough_ends_the_run_quietly(captioner: Path, photos: Path):
    done = shell('capcli caption "$PHOTOS" -m "$MODEL" | head -3', PHOTOS=photos, MODEL=captioner)
    assert (done.code, done.err) == (0, "")
    assert [row["file_name"] for row in done.rows] == ["000.png", "001.png", "002.png"]
    listed = shell('capcli caption "$PHOTOS" --dry-run | head -1', PHOTOS=photos)
    assert (listed.code, listed.out) == (0, b"000.png\n")
    assert listed.err in ("", "121 would be captioned, 0 skipped\n")
    unread = shell("capcli --help | true; capcli caption --help | true")
    assert (unread.code, unread.err) == (0, "")


def test_names_go_through_a_pipe_of_find(captioner: Path, photos: Path):
    script = 'cd "$PHOTOS" && find . -name "*line.png" -print0 | capcli caption -0 - -m "$MODEL" -q'
    done = shell(script, PHOTOS=photos, MODEL=captioner)
    assert (done.code, done.err) == (0, "")
    assert [row["file_name"] for row in done.rows] == ["./new\nline.png"]


def test_closed_streams_harm_nothing(captioner: Path, photos: Path, tmp_path: Path):
    # Nobody reads what is said: the rows are made all the same, and what is said does not get among them.
    variables = {"PHOTOS": photos, "MODEL": captioner, "OUT": tmp_path / "c.jsonl"}
    listed = '{ printf "nosuch%d.png\\n" {1..9}; echo "$PHOTOS/000.png"; } | capcli caption - -m "$MODEL"'
    for nobody in ("2>&-", "2> >(true)"):
        unheard = shell(f"{listed} {nobody}", **variables)
        assert (unheard.code, len(unheard.rows)) == (3, 1), nobody
    # Rows that go nowhere are an error; rows that go elsewhere are none.
    mute = shell('capcli caption "$PHOTOS/000.png" -m "$MODEL" >&-', **variables)
    assert mute.code == 1
    assert mute.err.startswith("capcli: cannot write to standard output")
    silent = shell('capcli caption "$PHOTOS/000.png" -m "$MODEL" -o "$OUT" >&- 2>&- <&-', **variables)
    assert silent.code == 0
    assert len((tmp_path / "c.jsonl").read_bytes().splitlines()) == 1


def test_standard_output_that_is_full_is_an_error(captioner: Path, photos: Path):
    with open("/dev/full", "wb") as full:
        done = execute("caption", photos, "-m", captioner, stdout=full)
    assert (done.code, done.err) == (1, "capcli: cannot write to standard output: No space left on device\n")


def on_terminal(*arguments: object) -> tuple[int, str]:
    """The command with all its streams on a terminal; its exit code and what was to be seen."""
    command = [*COMMAND[1:], *map(str, arguments)]
    child = pexpect.spawn(
        COMMAND[0], command, env=environment(TERM="xterm"), encoding="utf-8", timeout=PATIENCE, dimensions=(50, 160)
    )
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus, str(child.before)


def test_a_terminal_shows_readable_lines(captioner: Path, photos: Path):
    code, seen = on_terminal("caption", photos, "-m", captioner)
    assert code == 0
    *rows, closing = seen.splitlines()
    assert re.fullmatch(CLOSING, f"{closing}\n")
    assert len(rows) == 121
    assert all(re.match(r"(\d\d\d|new\\nline)\.png  ", row) for row in rows)
    assert "\x1b" not in seen


def test_a_terminal_shows_progress_while_rows_go_to_a_file(captioner: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    code, seen = on_terminal("caption", photos, "-m", captioner, "-o", out, "--batch-size", 2)
    assert code == 0
    assert re.search(r"captioning.*\d+/121.*0 failed.*images/s", seen)
    assert re.search(r"images/s in \w+$", seen.rstrip().splitlines()[-1])
    assert out.read_bytes().count(b"\n") == 121
    code, seen = on_terminal("caption", photos, "-m", captioner, "-o", out, "--overwrite", "--quiet")
    assert (code, seen) == (0, "")
    done = execute("caption", photos, "-m", captioner, "-o", out, "--overwrite")
    assert (done.code, done.out) == (0, b"")
    assert CLOSING.fullmatch(done.err)


def resident(process: subprocess.Popen[bytes]) -> int:
    """Bytes of memory that a process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc how much memory a process holds")
def test_two_hundred_thousand_names_are_listed_as_they_are_needed(captioner: Path, tmp_path: Path):
    first = paint(tmp_path / "tree/000", "0000.png")
    for number in range(1, 1000):
        os.link(first / "0000.png", first / f"{number:04d}.png")
    for number in range(1, 200):
        (tmp_path / f"tree/{number:03d}").symlink_to("000")
    process = spawn("caption", tmp_path / "tree", "-m", captioner, "--max-new-tokens", 1, bufsize=0)
    rows = [next_line(process) for _ in range(100)]
    before = resident(process)
    (tmp_path / "tree/002").unlink()  # which a walk of the whole tree would have listed by now
    assert process.stdout is not None
    rows += [process.stdout.readline() for _ in range(2400)]
    grown = resident(process) - before
    names = [json.loads(row)["file_name"] for row in rows]
    assert names == [f"{n}/{m:04d}.png" for n in ("000", "001", "003") for m in range(1000)][:2500]
    assert grown < 64 << 20
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read().decode().splitlines()
    assert process.wait(PATIENCE) == 0
    assert len(said) == 1
    assert said[0].startswith(f"capcli: {tmp_path}/tree/002: ")
    assert said[0].endswith("folder skipped")
