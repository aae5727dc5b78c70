"""The live view of a training run on a real terminal, in a pipe, without a reader, when quiet, and after --resume."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.cells import cell_len
from running import call
from training import exit_code, paint_data, recipe, start_training

from capcli.training.output.history import Point
from capcli.training.output.live_view import LiveView, Sample, sparkline

PREFACE = """
import sys, time
from capcli.training.output.history import Point
from capcli.training.output.live_view import LiveView, Sample

DOGS = Sample("dogs.jpg", "two dogs run along a beach", "A dog runs on sand")
CHINESE = Sample("\\u72ac.jpg", "\\u4e24\\u53ea\\u72d7\\u5728\\u6d77\\u6ee9\\u4e0a\\u5954\\u8dd1" * 4, "\\u4e00\\u53ea\\u72d7")
HOSTILE = Sample("\\x1b[2J[red]x\\n.jpg", "[bold]\\x1b]0;title\\x07 :dog: \\udcff", "\\x9b31m[/]")

def point(step, **more):
    return Point(step, step / 4, **{"loss": 8 / step, "images_per_second": 128.4, **more})
"""
RUN = """
with LiveView(8, quiet=False) as view:
    view.write_line("special tokens: [pad] \\x1b[31m<pad>")
    for step in range(1, 9):
        time.sleep(0.12)
        view.step(point(step))
        if step == 5:
            view.evaluating(30, 100)
            time.sleep(0.12)
            view.evaluating(60, 100)
            view.evaluated(Point(5, 1.25, val_loss=2.4, scores={"CIDEr": 0.5124}), [DOGS, CHINESE, HOSTILE], "cider")
print("over")
"""
FAST = RUN.replace("0.12", "0.001")


def screen(data: bytes, columns: int) -> list[str]:
    """The lines that a terminal shows after these bytes, which use only the escape sequences that rich uses."""
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


def terminal(columns: int = 80, **env: str) -> dict[str, str]:
    """The environment of a process on a terminal of this width."""
    env = {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "30", "PYTHONUTF8": "1", **env}
    unset = {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"} - env.keys()
    return {name: value for name, value in os.environ.items() if name not in unset} | env


def read_terminal(leader: int, until: bytes | None = None) -> bytes:
    """What is written to a terminal until its last writer is gone, or until this text is."""
    data = b""
    while until is None or until not in data:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux reports the end of a terminal so
            break
        if not chunk:
            break
        data += chunk
    return data


def on_terminal(script: str, *, columns: int = 80, hang_up: bool = False, **env: str) -> tuple[int, bytes, str]:
    """Runs a script whose standard error is a terminal: exit code, what the terminal received, standard output."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PREFACE + script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=follower,
        env=terminal(columns, **env),
    )
    os.close(follower)
    data = read_terminal(leader, b"step" if hang_up else None)
    os.close(leader)
    out, _ = process.communicate(timeout=60)
    return process.returncode, data, out.decode()


def in_pipe(script: str) -> tuple[int, list[str]]:
    process = subprocess.run([sys.executable, "-c", PREFACE + script], capture_output=True, timeout=60)
    return process.returncode, process.stderr.decode().splitlines()


def frames(data: bytes, columns: int) -> list[list[str]]:
    """The screen each time before the display was redrawn."""
    ends = [match.start() for match in re.finditer(rb"\r\x1b\[2K", data)]
    return [screen(data[:end], columns) for end in ends]


def all_frames(data: bytes, columns: int) -> str:
    return "\n".join(line for frame in frames(data, columns) for line in frame)


def test_a_terminal_shows_the_run_and_keeps_the_evaluations() -> None:
    code, data, out = on_terminal(RUN)
    assert (code, out) == (0, "over\n")
    shown = all_frames(data, 80)
    for text in ("step 5/8   epoch 1.25   128 images/s   1 s left", "loss 1.60", "evaluating 60/100 images"):
        assert text in shown, text
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
    assert b"\x1b[?25h" in data[data.rfind(b"\x1b[?25l") :]  # the cursor is visible again


@pytest.mark.parametrize("columns", [12, 200])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    code, data, _ = on_terminal(RUN, columns=columns)
    assert code == 0
    shown = all_frames(data, columns)  # screen() checks the width
    assert "step 8/8" in shown
    assert "loss 1.00" in shown
    assert any("two" in line for line in screen(data, columns))


def test_a_terminal_without_colours_or_unicode_gets_neither() -> None:
    code, data, _ = on_terminal(
        RUN, NO_COLOR="1", PYTHONUTF8="0", PYTHONIOENCODING="ascii:backslashreplace", LC_ALL="C"
    )
    assert code == 0
    assert data.isascii()
    assert re.search(rb"\x1b\[[0-9;]*3[0-9]", data) is None
    assert b"step 8/8" in data


def test_a_terminal_that_cannot_move_the_cursor_gets_lines() -> None:
    code, data, _ = on_terminal(FAST, TERM="dumb")
    assert code == 0
    assert b"\x1b" not in data
    assert b"step 5/8: loss 1.60" in data


def test_other_output_stays_above_the_display() -> None:
    code, data, out = on_terminal(
        "import warnings\n"
        "with LiveView(3, quiet=False) as view:\n"
        "    view.step(point(1)); time.sleep(0.12); view.step(point(2))\n"
        "    print('a stray line', file=sys.stderr); warnings.warn('beware'); print('in the file')\n"
        "    time.sleep(0.12); view.step(point(3)); time.sleep(0.12)\n"
    )
    assert (code, out) == (0, "in the file\n")
    kept = "\n".join(screen(data, 80))
    assert "a stray line" in kept
    assert "beware" in kept
    assert "step 3/3" not in kept
    assert "step 3/3" in all_frames(data, 80)


def test_an_error_restores_the_terminal() -> None:
    code, data, _ = on_terminal(
        "with LiveView(3, quiet=False) as view:\n    view.step(point(1)); time.sleep(0.2); view.step(point(2)); 1 / 0\n"
    )
    assert code == 1
    assert "ZeroDivisionError: division by zero" in screen(data, 80)[-2:]
    assert data.rfind(b"\x1b[?25h") > data.rfind(b"\x1b[?25l")


def test_the_display_is_drawn_ten_times_a_second_at_most() -> None:
    began = time.monotonic()
    code, data, _ = on_terminal(
        "with LiveView(10**6, quiet=False) as view:\n    for step in range(1, 20_001): view.step(point(step))\n"
    )
    assert code == 0
    assert len(frames(data, 80)) <= 12 * (time.monotonic() - began) + 5


def test_a_closed_terminal_does_not_end_the_training(tmp_path: Path) -> None:
    done = tmp_path / "done"
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    code, _, out = on_terminal(f"{ignoring}\n{RUN}\nview.write_line('more')\nopen({str(done)!r}, 'w')", hang_up=True)
    assert (code, out) == (0, "over\n")
    assert done.exists()


@pytest.mark.parametrize("closed", ["pipe", "descriptor"])
def test_a_standard_error_without_reader_does_not_end_the_training(closed: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", PREFACE + FAST]
    if closed == "descriptor":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, timeout=60)
    os.close(writer)
    assert (ended.returncode, ended.stdout) == (0, b"over\n")


def test_a_pipe_gets_plain_lines() -> None:
    code, lines = in_pipe(FAST)
    assert code == 0
    assert lines[0] == r"special tokens: [pad] \x1b[31m<pad>"
    figures = r"step 5/8: loss 1.60, validation loss 2.40, CIDEr 0.512 \(best so far\), 128 images/s(, \d s left)?"
    assert re.fullmatch(figures, lines[1])
    assert lines[2:] == [
        "  dogs.jpg: two dogs run along a beach (reference: A dog runs on sand)",
        f"  犬.jpg: {'两只狗在海滩上奔跑' * 4} (reference: 一只狗)",
        r"  \x1b[2J[red]x\n.jpg: [bold]\x1b]0;title\x07 :dog: \xff (reference: \x9b31m[/])",
    ]


def test_quiet_writes_nothing() -> None:
    quiet = FAST.replace("False", "True")
    assert in_pipe(quiet) == (0, [])
    assert on_terminal(quiet) == (0, b"", "over\n")


def test_the_sparkline_shows_all_values_from_low_to_high() -> None:
    assert sparkline([1.0, 2.0, 4.0, 128.0], 24) == "▁▂▃█"  # logarithmic
    assert sparkline([-1.0, 0.0, 6.0], 24) == "▁▂█"
    assert sparkline([3.0, 3.0], 24) == "▁▁"
    assert sparkline(list(range(1_000_000)), 4) == "▁▅▇█"
    assert sparkline([1.0], 24) == sparkline([1.0, 2.0], 1) == ""


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of_run(
    capsys: pytest.CaptureFixture[str],
    total: int,
    *,
    seconds_per_step: float,
    every: int = 0,
    pause: float = 0,
    samples: Sequence[Sample] = (),
) -> list[tuple[float, str]]:
    """The lines of a run in a pipe, each with the seconds that were left when it was written."""
    clock = Clock()
    lines: list[tuple[float, str]] = []
    with LiveView(total, quiet=False, clock=clock) as view:

        def collect() -> None:
            lines.extend((clock.now, line) for line in capsys.readouterr().err.splitlines())

        for step in range(1, total + 1):
            clock.now += seconds_per_step
            view.step(Point(step, step / 100, loss=2.0, images_per_second=64 / seconds_per_step))
            collect()
            if every and step % every == 0:
                for done in range(10):
                    view.evaluating(done * 50, 500)
                    collect()
                    clock.now += pause / 10
                view.evaluated(Point(step, step / 100, val_loss=2.5), samples, best=None)
                collect()
    return [(clock.now - then, line) for then, line in lines]


def seconds_left(line: str) -> float:
    """The time left that a line states."""
    match = re.search(r"(?:(\d+) h )?(?:(\d+) min|(\d+) s) left", line)
    assert match, line
    hours, minutes, rest = (int(group or 0) for group in match.groups())
    return 3600 * hours + 60 * minutes + rest


def test_a_log_gets_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of_run(capsys, 600, seconds_per_step=0.5)
    assert [line for _, line in lines] == [
        f"step {step}/600: loss 2.00, 128 images/s, {left} left"
        for step, left in zip(
            range(60, 600, 60),
            ["4 min", "4 min", "4 min", "3 min", "2 min", "2 min", "2 min", "60 s", "30 s"],
            strict=True,
        )
    ] + ["step 600/600: loss 2.00, 128 images/s"]


def test_the_time_left_includes_the_evaluations_to_come(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of_run(capsys, 9000, seconds_per_step=0.2, every=500, pause=90)
    states = [(left, seconds_left(line)) for left, line in lines if " left" in line and left < 2800]
    assert len(states) > 50
    assert all(abs(left - stated) <= 150 for left, stated in states), states


def test_a_long_evaluation_writes_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for _, line in lines_of_run(capsys, 20, seconds_per_step=0.1, every=20, pause=200)]
    assert "step 20/20: evaluated 100 of 500 images" in lines
    assert lines[-1] == "step 20/20: loss 2.00, validation loss 2.50, 640 images/s"


def test_figures_that_are_missing_or_extreme_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView(0, quiet=False) as view:
        view.write_line("")
        view.evaluated(Point(0, 0.0), [], best="loss")
        view.step(Point(1, 0.1, loss=float("nan")))
        view.evaluated(Point(1, 0.1, loss=1e9, val_loss=1e-5, images_per_second=0.31), [], best=None)
    assert capsys.readouterr().err.splitlines() == [
        "",
        "step 0/0: best so far",
        "step 1/0: loss 1.00e+09, validation loss 1.00e-05, 0.31 images/s",
    ]


# The command itself


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps."""
    place = tmp_path_factory.mktemp("view")
    config = recipe(place / "run.toml", paint_data(place / "pictures"))
    with undrawn():
        result = call("train", "--config", config, "--out", place / "out")
    assert result.code == 0, result.err
    return place / "out"


def undrawn() -> Any:
    """Without curves.png, which would take most of the time."""
    return mock.patch("capcli.training.loop.callbacks.draw_curves", return_value=None)


@pytest.fixture
def ten_seconds_per_step() -> Iterator[None]:
    """The view's clock advances by ten seconds at each optimizer step."""
    from capcli.training.loop.callbacks import ScheduleCallback

    clock, on_step_end = Clock(), ScheduleCallback.on_step_end

    def advance(*arguments: Any, **named: Any) -> Any:
        clock.now += 10
        return on_step_end(*arguments, **named)

    with (
        mock.patch.object(ScheduleCallback, "on_step_end", advance),
        mock.patch("capcli.training.run.LiveView", partial(LiveView, clock=clock)),
    ):
        yield


@pytest.mark.usefixtures("ten_seconds_per_step")
def test_the_time_left_of_a_resumed_run_counts_only_its_own_steps(six: Path, tmp_path: Path) -> None:
    out = shutil.copytree(six, tmp_path / "out")
    with undrawn():
        result = call("train", "--out", out, "--resume", "--max-steps", 30, "--evaluate-every", 1000)
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("step ") and "validation" not in line]
    assert [line.split(":")[0] for line in lines[:7]] == [f"step {step}/30" for step in range(9, 30, 3)]
    for line in lines[:7]:
        step = int(line.split("/")[0].removeprefix("step "))
        assert abs(seconds_left(line) - 10 * (30 - step)) <= 30, line  # minutes are rounded


def test_a_resumed_run_shows_its_step_on_a_terminal_from_the_start(six: Path, tmp_path: Path) -> None:
    out = shutil.copytree(six, tmp_path / "out")
    leader, follower = pty.openpty()
    process = start_training("--out", out, "--resume", "--max-steps", 9, stderr=follower, **terminal())
    os.close(follower)
    data = read_terminal(leader)
    os.close(leader)
    assert exit_code(process) == 0, data
    steps = re.findall(r"step (\d+)/9\b", all_frames(data, 80))
    assert steps[0] == "6"
    kept = "\n".join(screen(data, 80))
    assert "resuming from checkpoint-6" in kept
    assert "step 9/9: loss " in kept
    assert kept.count("reference") == 2
