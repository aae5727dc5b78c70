"""`capcli caption` with other programs: pipes, terminals, closed streams, and more names than are listed at once."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
from pathlib import Path
from typing import Any

import pexpect
import pytest
from running import COMMAND, PATIENCE, ended, environment, execute, paint, shell, spawn

from capcli.records import Candidate, Caption
from capcli.sinks.row_formats import RowFields
from capcli.sinks.stdout import readable

CLOSING = re.compile(r"\d+ captioned, \d+ skipped, \d+ failed, [\d.]+ images/s in (float32|bfloat16)\n")
COUNT = 42
ERASE = "\r\x1b[2K"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = (f"{n:03d}.png" for n in range(COUNT - 2))
    return paint(tmp_path_factory.mktemp("photos"), *names, "000\nnew line.png", "\x1b[31mred.png")


def next_line(process: subprocess.Popen[bytes]) -> bytes:
    """The next line on a process's standard output; the test fails when none comes."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(PATIENCE), "nothing came"
    return process.stdout.readline()


def test_a_row_is_written_before_the_next_name_is_read_and_an_interrupt_ends_the_wait(captioner: Path, photos: Path):
    process = spawn("caption", "-", "-m", captioner, stdin=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    for number in range(4):
        name = str(photos / f"{number:03d}.png")
        process.stdin.write(f"{name}\n".encode())
        assert json.loads(next_line(process))["file_name"] == name
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 130  # while standard input is still open
    done = ended(process)
    assert done.out == b""
    assert "4 captioned" in done.err
    assert "Traceback" not in done.err


def test_a_closed_pipe_ends_the_run_quietly(captioner: Path, photos: Path):
    script = 'cd "$PHOTOS" && find . -name "*.png" -print0 | sort -z | capcli caption -0 - -m "$MODEL" | head -3'
    piped = shell(script, PHOTOS=photos, MODEL=captioner, LC_ALL="C")
    assert (piped.code, piped.err) == (0, "")
    names = [row["file_name"] for row in piped.rows]
    assert names == ["./\x1b[31mred.png", "./000\nnew line.png", "./000.png"]
    listed = shell('capcli caption "$PHOTOS" --dry-run | head -1', PHOTOS=photos)
    assert (listed.code, listed.out) == (0, b"\\x1b[31mred.png\n")
    assert listed.err in ("", f"{COUNT} would be captioned, 0 skipped\n")
    unread = shell("capcli --help | true; capcli caption --help | true")
    assert (unread.code, unread.err) == (0, "")


@pytest.mark.slow
def test_closed_streams_do_no_harm(captioner: Path, photos: Path, tmp_path: Path):
    variables = {"PHOTOS": photos, "MODEL": captioner, "OUT": tmp_path / "c.jsonl"}
    # Without a standard error that takes messages all rows are written, and no message is among them.
    listed = '{ printf "nosuch%d.png\\n" {1..9}; echo "$PHOTOS/000.png"; } | capcli caption - -m "$MODEL"'
    for redirection in ("2>&-", "2> >(true)"):
        silent = shell(f"{listed} {redirection}", **variables)
        assert (silent.code, len(silent.rows)) == (3, 1), redirection
    # Without a standard output rows on it are an error, and rows in a file are not.
    lost = shell('capcli caption "$PHOTOS/000.png" -m "$MODEL" >&-', **variables)
    assert lost.code == 1
    assert lost.err.startswith("capcli: cannot write to standard output")
    to_file = shell('capcli caption "$PHOTOS/000.png" -m "$MODEL" -o "$OUT" >&- 2>&- <&-', **variables)
    assert to_file.code == 0
    assert len((tmp_path / "c.jsonl").read_bytes().splitlines()) == 1


def test_a_full_standard_output_is_an_error(captioner: Path, photos: Path):
    with open("/dev/full", "wb") as full:
        done = execute("caption", photos, "-m", captioner, stdout=full)
    assert (done.code, done.err) == (1, "capcli: cannot write to standard output: No space left on device\n")


def start_on_terminal(*arguments: object, columns: int = 160, **env: str) -> pexpect.spawn:
    """Start the command with all its streams on a terminal."""
    command = [*COMMAND[1:], *map(str, arguments)]
    variables = environment(**{"TERM": "xterm", **env})
    variables.pop("COLUMNS", None)  # which pytest-xdist sets
    return pexpect.spawn(
        COMMAND[0],
        command,
        env=variables,
        encoding="utf-8",
        timeout=PATIENCE,
        dimensions=(50, columns),
    )


def on_terminal(*arguments: object, **options: Any) -> tuple[int, str]:
    """Run the command with all its streams on a terminal. Returns the exit code and the output."""
    child = start_on_terminal(*arguments, **options)
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus, str(child.before)


def kept(shown: str) -> list[str]:
    """The lines that stay on the terminal: the status line is erased before anything else is written."""
    return [line.rpartition(ERASE)[2] for line in shown.removesuffix("\r\n").split("\r\n")]


def test_a_terminal_shows_readable_lines_without_control_characters(captioner: Path, photos: Path):
    code, shown = on_terminal("caption", photos, "-m", captioner, "--fields", "width")
    assert code == 0
    assert re.search(r"loading the model  \d s", shown)
    *rows, closing = kept(shown)
    assert re.fullmatch(CLOSING, f"{closing}\n")
    assert len(rows) == COUNT
    assert rows[0].startswith("\\x1b[31mred.png  ")
    row = re.compile(r"(\d\d\d|000\\nnew line|\\x1b\[31mred)\.png  .*  \(score -\d+\.\d\d, width \d+\)")
    assert all(row.fullmatch(line) for line in rows)
    assert "\x1b" not in "".join(rows)


@pytest.mark.slow
def test_a_terminal_shows_progress_while_rows_go_to_a_file(captioner: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    code, shown = on_terminal("caption", photos, "-m", captioner, "-o", out, "--batch-size", 2)
    assert code == 0
    assert "loading the model" in shown
    assert re.search(rf"(captioning|encoding|decoding) .*\d+/{COUNT}.*under way  0 failed", shown)
    assert re.search(r"images/s in \w+$", shown.rstrip().splitlines()[-1])
    assert out.read_bytes().count(b"\n") == COUNT
    code, shown = on_terminal("caption", photos, "-m", captioner, "-o", out, "--overwrite", "--quiet")
    assert (code, shown) == (0, "")
    done = execute("caption", photos, "-m", captioner, "-o", out, "--overwrite")
    assert (done.code, done.out) == (0, b"")
    assert CLOSING.fullmatch(done.err)


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_a_terminal_says_how_far_an_interrupted_run_came(captioner: Path, photos: Path, tmp_path: Path, twice: bool):
    out = tmp_path / "c.jsonl"
    slow = ("--batch-size", 4, "--max-new-tokens", 60, "--min-new-tokens", 60)
    child = start_on_terminal("caption", photos, "-m", captioner, *slow, "-o", out)
    child.expect(rf"\r\x1b\[2K. \w+ +[^\r]*[1-9]\d*/{COUNT} ")
    child.sendintr()
    child.expect(r"capcli: interrupted; finishing .*interrupt again to exit at once")
    if twice:
        child.sendintr()
    child.expect(rf"interrupted: (\d+) of {COUNT} captioned; the same command goes on\r\n")
    assert int(child.match[1]) >= 1
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert on_terminal("caption", photos, "-m", captioner, *slow, "-o", out)[0] == 0
    assert out.read_bytes().count(b"\n") == COUNT


def test_a_narrow_terminal_gets_one_row_that_never_fills_it_and_a_dumb_one_none(captioner: Path, photos: Path):
    code, shown = on_terminal("caption", photos, "-m", captioner, columns=30, NO_COLOR="1")
    assert code == 0
    drawn = re.findall(r"\r\x1b\[2K([^\r\n]*)", shown)
    assert all(len(line) < 30 for line in drawn if line[:1] in "|/-\\")
    assert re.search(r"\x1b\[[0-9;]*m", shown) is None
    assert all(len(row) <= 30 for row in kept(shown)[:-1])
    code, shown = on_terminal("caption", photos, "-m", captioner, TERM="dumb")
    assert code == 0
    assert "\x1b" not in shown
    assert "loading" not in shown


def test_rows_on_a_terminal_break_between_words():
    best, other = Candidate("two dogs run along a beach", -0.4123), Candidate("狗" * 20, -1.5)
    caption = Caption("beach.jpg", (best, other), {"width": 640})
    assert readable(caption, RowFields(True, ("width", "mode")), 40) == (
        "beach.jpg  two dogs run along a\n"
        "    beach  (score -0.41, width 640, mode\n"
        "    unknown)\n"
        "beach.jpg\n"
        f"    {'狗' * 18}\n"
        f"    {'狗' * 2}  (score -1.50)\n"
    )


def resident(process: subprocess.Popen[bytes]) -> int:
    """The resident memory of a process in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_two_hundred_thousand_names_are_listed_as_they_are_needed(captioner: Path, tmp_path: Path):
    images, folders, rows = 500, 400, 1250
    first = paint(tmp_path / "tree/000", "0000.png")
    for number in range(1, images):
        os.link(first / "0000.png", first / f"{number:04d}.png")
    for number in range(1, folders):
        (tmp_path / f"tree/{number:03d}").symlink_to("000")
    process = spawn("caption", tmp_path / "tree", "-m", captioner, "--max-new-tokens", 1, bufsize=0)
    lines = [next_line(process) for _ in range(100)]
    before = resident(process)
    (tmp_path / "tree/002").unlink()  # it would be in a list of the whole tree already
    assert process.stdout is not None
    lines += [process.stdout.readline() for _ in range(rows - 100)]
    grown = resident(process) - before
    names = [json.loads(line)["file_name"] for line in lines]
    assert names == [f"{n}/{m:04d}.png" for n in ("000", "001", "003") for m in range(images)][:rows]
    assert grown < 64 << 20
    process.stdout.close()
    assert process.stderr is not None
    messages = process.stderr.read().decode().splitlines()
    assert process.wait(PATIENCE) == 0
    assert len(messages) == 1
    assert messages[0] == "capcli: 002/: the folder cannot be listed: No such file or directory"
