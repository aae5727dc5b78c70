"""A training run on a real terminal, in a pipe, without a reader and quiet: what is seen, what stays, what is left to wait."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.cells import cell_len

from capcli.training.output.history import Point
from capcli.training.output.view import Sample, View

PREFACE = """
import sys, time
from capcli.training.history import Point
from capcli.training.view import Sample, View

DOGS = Sample("dogs.jpg", "two dogs run along a beach", "A dog runs on sand")
CHINESE = Sample("\\u72ac.jpg", "\\u4e24\\u53ea\\u72d7\\u5728\\u6d77\\u6ee9\\u4e0a\\u5954\\u8dd1" * 4, "\\u4e00\\u53ea\\u72d7")
HOSTILE = Sample("\\x1b[2J[red]x\\n.jpg", "[bold]\\x1b]0;title\\x07 :dog: \\udcff", "\\x9b31m[/]")

def point(step, **more):
    return Point(step, step / 4, **{"loss": 8 / step, "images_per_second": 128.4, **more})
"""
RUN = """
with View(8, quiet=False) as view:
    view.say("special tokens: [pad] \\x1b[31m<pad>")
    for step in range(1, 9):
        time.sleep(0.12)
        view.step(point(step))
        if step == 5:
            view.evaluating(30, 100)
            time.sleep(0.12)
            view.evaluating(60, 100)
            view.evaluated(Point(5, 1.25, val_loss=2.4, scores={"CIDEr": 0.5124}), [DOGS, CHINESE, HOSTILE], True)
print("over")
"""


def screen(data: bytes, columns: int) -> list[str]:
    """The lines that a terminal shows after these bytes, which move the cursor as rich does and in no other way."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", data.decode()):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part.endswith("A") and part[0] == "\x1b":
            row -= int(part[2:-1])
            assert row >= 0
        elif part[0] == "\x1b":
            assert re.fullmatch(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]", part), part
        else:
            assert column == 0 or cell_len(lines[row]) == column
            lines[row] = (lines[row] if column else "") + part
            column = cell_len(lines[row])
            assert column <= columns, lines[row]
    return [line.rstrip() for line in lines]


def on_terminal(script: str, *, columns: int = 80, hang_up: bool = False, **env: str) -> tuple[int, bytes, str]:
    """Runs a script whose standard error is a terminal: its exit code, what the terminal got, its standard output."""
    leader, follower = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "30", "PYTHONUTF8": "1", **env}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        if not env.get(name):
            env.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", PREFACE + script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=follower,
        env=env,
    )
    os.close(follower)
    got = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # how a terminal says that its last writer has gone
            break
        got += data
        if not data or (hang_up and b"step" in got):
            break
    os.close(leader)
    out, _ = process.communicate(timeout=60)
    return process.returncode, got, out.decode()


def in_pipe(script: str) -> tuple[int, list[str]]:
    process = subprocess.run([sys.executable, "-c", PREFACE + script], capture_output=True, timeout=60)
    return process.returncode, process.stderr.decode().splitlines()


def frames(data: bytes, columns: int) -> list[list[str]]:
    """What the terminal showed each time the cursor was to go back."""
    ends = [match.start() for match in re.finditer(rb"\r\x1b\[2K", data)]
    return [screen(data[:end], columns) for end in ends]


def seen(data: bytes, columns: int) -> str:
    return "\n".join(line for frame in frames(data, columns) for line in frame)


def test_a_terminal_shows_the_run_and_keeps_its_captions():
    code, data, out = on_terminal(RUN)
    assert (code, out) == (0, "over\n")
    shown = seen(data, 80)
    for words in ("step 5/8   epoch 1.25", "128 images/s", " s left", "loss 1.60", "evaluating 60/100 images"):
        assert words in shown, words
    assert re.search("loss 1.33 [▁-█]{6}   validation loss 2.40   CIDEr 0.512   best at step 5", shown)
    assert "━" * 40 in shown
    kept = [line for line in screen(data, 80) if line]
    assert kept[0] == r"special tokens: [pad] \x1b[31m<pad>"
    assert kept[1] == "step 5/8: loss 1.60, validation loss 2.40, CIDEr 0.512 (best so far)"
    chinese = "两只狗在海滩上奔跑" * 4
    assert kept[2:] == [
        f"  {name}{' ' * (21 - cell_len(name))}{text}"
        for name, text in (
            ("dogs.jpg", "two dogs run along a beach"),
            ("reference", "A dog runs on sand"),
            ("犬.jpg", chinese[:28]),
            ("", chinese[28:]),
            ("reference", "一只狗"),
            (r"\x1b[2J[red]x\n.jpg", r"[bold]\x1b]0;title\x07 :dog: \xff"),
            ("reference", r"\x9b31m[/]"),
        )
    ]
    assert re.search(rb"\x1b\[[0-9;]*3[0-9]", data)  # colours
    assert b"\x1b[?25h" in data[data.rfind(b"\x1b[?25l") :]  # the cursor is back


@pytest.mark.parametrize("columns", [12, 40, 200])
def test_every_width_is_drawn_within_it(columns: int):
    code, data, _ = on_terminal(RUN, columns=columns)
    assert code == 0
    shown = seen(data, columns)  # no line passes the width
    assert "step 8/8" in shown
    assert "loss 1.00" in shown.replace("…", "")
    assert any("two" in line for line in screen(data, columns))


def test_without_colours_nothing_is_coloured():
    _, data, _ = on_terminal(RUN, NO_COLOR="1")
    assert re.search(rb"\x1b\[[0-9;]*3[0-9]", data) is None
    assert "step 8/8" in seen(data, 80)


def test_a_terminal_that_cannot_draw_gets_lines():
    code, data, _ = on_terminal(RUN.replace("0.12", "0.001"), TERM="dumb")
    assert code == 0
    assert b"\x1b" not in data
    assert b"step 5/8: loss 1.60" in data


def test_a_terminal_of_plain_characters_gets_those():
    code, data, _ = on_terminal(RUN, PYTHONUTF8="0", PYTHONIOENCODING="ascii:backslashreplace", LC_ALL="C")
    assert code == 0
    data.decode("ascii")
    assert b"loss 1.33" in re.sub(rb"\x1b\[[0-9;]*m", b"", data)


def test_what_others_print_stays_above_the_display():
    code, data, out = on_terminal(
        "import warnings\n"
        "with View(3, quiet=False) as view:\n"
        "    view.step(point(1)); time.sleep(0.12); view.step(point(2))\n"
        "    print('a stray line', file=sys.stderr); warnings.warn('beware'); print('in the file')\n"
        "    time.sleep(0.12); view.step(point(3)); time.sleep(0.12)\n"
    )
    assert (code, out) == (0, "in the file\n")
    kept = "\n".join(screen(data, 80))
    assert "a stray line" in kept
    assert "beware" in kept
    assert "step 3/3" not in kept
    assert "step 3/3" in seen(data, 80)


def test_an_error_leaves_the_terminal_as_it_was():
    code, data, _ = on_terminal(
        "with View(3, quiet=False) as view:\n    view.step(point(1)); time.sleep(0.2); view.step(point(2)); 1 / 0\n"
    )
    assert code == 1
    kept = screen(data, 80)
    assert "ZeroDivisionError: division by zero" in kept[-2:]
    assert data.rfind(b"\x1b[?25h") > data.rfind(b"\x1b[?25l")


@pytest.mark.parametrize("columns", [80])
def test_the_display_is_drawn_ten_times_a_second_at_most(columns: int):
    began = time.monotonic()
    code, data, _ = on_terminal(
        "with View(10**6, quiet=False) as view:\n    for step in range(1, 40_001): view.step(point(step))\n"
    )
    assert code == 0
    assert len(frames(data, columns)) <= 12 * (time.monotonic() - began) + 5


def test_a_hung_up_terminal_does_not_end_training(tmp_path: Path):
    done = tmp_path / "done"
    script = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{RUN}\nview.say('more')\nopen({str(done)!r}, 'w')"
    code, _, out = on_terminal(script, hang_up=True)
    assert (code, out) == (0, "over\n")
    assert done.exists()


@pytest.mark.parametrize("closed", ["pipe", "descriptor"])
def test_a_standard_error_without_reader_does_not_end_training(closed: str):
    reader, writer = os.pipe()
    os.close(reader)
    script = RUN.replace("0.12", "0.001")
    command = [sys.executable, "-c", PREFACE + script]
    if closed == "descriptor":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, timeout=60)
    os.close(writer)
    assert (ended.returncode, ended.stdout) == (0, b"over\n")


def test_a_pipe_gets_plain_lines():
    code, lines = in_pipe(RUN.replace("0.12", "0.001"))
    assert code == 0
    assert lines[0] == r"special tokens: [pad] \x1b[31m<pad>"
    told = r"step 5/8: loss 1.60, validation loss 2.40, CIDEr 0.512 \(best so far\), 128 images/s(, \d s left)?"
    assert re.fullmatch(told, lines[1])
    assert lines[2:] == [
        "  dogs.jpg: two dogs run along a beach (reference: A dog runs on sand)",
        f"  犬.jpg: {'两只狗在海滩上奔跑' * 4} (reference: 一只狗)",
        r"  \x1b[2J[red]x\n.jpg: [bold]\x1b]0;title\x07 :dog: \xff (reference: \x9b31m[/])",
    ]


def test_quiet_shows_nothing():
    quiet = RUN.replace("False", "True").replace("0.12", "0.001")
    assert in_pipe(quiet) == (0, [])
    assert on_terminal(quiet) == (0, b"", "over\n")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def logged(
    capsys: pytest.CaptureFixture[str],
    total: int,
    *,
    each: float,
    every: int = 0,
    pause: float = 0,
    first: int = 0,
    samples: Sequence[Sample] = (),
) -> list[tuple[float, str]]:
    """The lines of a whole run in a pipe, with the seconds that were really left when each was said."""
    clock = Clock()
    lines: list[tuple[float, str]] = []
    with View(total, quiet=False, first_step=first, clock=clock) as view:

        def look() -> None:
            lines.extend((clock.now, line) for line in capsys.readouterr().err.splitlines())

        for step in range(first + 1, total + 1):
            clock.now += each
            view.step(Point(step, step / 100, loss=2.0, images_per_second=64 / each))
            look()
            if every and step % every == 0:
                for done in range(10):
                    view.evaluating(done * 50, 500)
                    look()
                    clock.now += pause / 10
                view.evaluated(Point(step, step / 100, val_loss=2.5), samples, best=False)
                look()
    return [(clock.now - then, line) for then, line in lines]


def seconds(line: str) -> float:
    """The time left that a line tells."""
    match = re.search(r"(?:(\d+) h )?(?:(\d+) min|(\d+) s) left", line)
    assert match, line
    hours, minutes, rest = (int(group or 0) for group in match.groups())
    return 3600 * hours + 60 * minutes + rest


def test_a_log_gets_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]):
    lines = logged(capsys, 600, each=0.5)
    assert [line for _, line in lines] == [
        f"step {step}/600: loss 2.00, 128 images/s, {left} left"
        for step, left in zip(
            range(60, 600, 60),
            ["4 min", "4 min", "4 min", "3 min", "2 min", "2 min", "2 min", "60 s", "30 s"],
            strict=True,
        )
    ] + ["step 600/600: loss 2.00, 128 images/s"]


def test_the_time_left_counts_the_evaluations_to_come(capsys: pytest.CaptureFixture[str]):
    lines = logged(capsys, 9000, each=0.2, every=500, pause=90)
    told = [(left, seconds(line)) for left, line in lines if " left" in line and left < 3300]
    assert len(told) > 60
    assert all(abs(left - estimate) <= 40 for left, estimate in told), told  # whole minutes, and a mark's second


def test_a_resumed_run_does_not_count_what_was_done_before(capsys: pytest.CaptureFixture[str]):
    lines = logged(capsys, 9000, each=1.0, first=8000)
    assert lines[0][1] == "step 8030/9000: loss 2.00, 64 images/s, 16 min left"


def test_a_long_evaluation_is_told_of(capsys: pytest.CaptureFixture[str]):
    lines = [line for _, line in logged(capsys, 20, each=0.1, every=20, pause=200)]
    assert "step 20/20: evaluated 100 of 500 images" in lines
    assert lines[-1] == "step 20/20: loss 2.00, validation loss 2.50, 640 images/s"


def test_little_is_known_at_the_start(capsys: pytest.CaptureFixture[str]):
    with View(0, quiet=False) as view:
        view.say("")
        view.evaluated(Point(0, 0.0), [], best=True)
        view.step(Point(1, 0.1, loss=float("nan")))
        view.evaluated(Point(1, 0.1, loss=1e9, val_loss=1e-5, images_per_second=0.31), [], best=False)
    assert capsys.readouterr().err.splitlines() == [
        "",
        "step 0/0: best so far",
        "step 1/0: loss 1.00e+09, validation loss 1.00e-05, 0.31 images/s",
    ]
