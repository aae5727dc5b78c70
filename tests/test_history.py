"""history.csv is exact and complete at every moment, also after a kill or --resume; curves.png shows its points."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import pytest
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from capcli.errors import CapcliError
from capcli.training.loop.callbacks import ReportCallback, draw_curves
from capcli.training.output.history import History, Point, read_history

NAMES = "step,epoch,loss,val_loss,learning_rate,grad_norm,images_per_second,CIDEr,Bleu_1,Bleu_2,Bleu_3,Bleu_4,ROUGE_L"
DAMAGED = {
    "Dear all,\nno table\n": "not the history",
    "": "not the history",
    "step,epoch,loss\n1,0.5,lots\n2,0.5,2.0\n": "line 2",
    "step,epoch,loss\n1,0.5,2.0\n2,0.5\n3,0.5,2.0\n": "line 3",
    "step,epoch,loss\nfirst,0.5,2.0\n2,0.5,2.0\n": "line 2",
}


def course(count: int, *, evaluated: int = 0) -> list[Point]:
    """Points of a run whose loss falls, with an evaluation every `evaluated` steps."""
    noise = np.random.default_rng(count).normal(0, 0.1, count)
    points = []
    for step in range(1, count + 1):
        share = step / count
        loss = 2 + 8 * math.exp(-20 * share) + noise[step - 1] * share
        points.append(Point(step, 3 * share, loss=loss, learning_rate=5e-5 * (1 - share), grad_norm=1 / 3))
        if evaluated and step % evaluated == 0:
            points.append(Point(step, 3 * share, val_loss=loss + 0.1, scores={"CIDEr": share, "Bleu_4": share / 3}))
    return points


def cells(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        return set(map(tuple, np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()))


def test_numbers_are_read_back_exactly(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.add(Point(1, 0.1 + 0.2, loss=np.float32(1) / 3, learning_rate=5e-324, grad_norm=math.inf, val_loss=-0.0))
    history.add(Point(2, 1.0, loss=1e22, images_per_second=1 / 7, scores={"CIDEr": 2 / 3, "ROUGE_L": np.float64(0.1)}))
    back = read_history(tmp_path / "history.csv")
    assert back == history.points
    assert str(back[0].val_loss) == "-0.0"
    assert (tmp_path / "history.csv").read_text() == (
        f"{NAMES}\n"
        "1,0.30000000000000004,0.3333333432674408,-0.0,5e-324,inf,,,,,,,\n"
        "2,1.0,1e+22,,,,0.14285714285714285,0.6666666666666666,,,,,0.1\n"
    )


def test_a_training_point_and_an_evaluation_of_one_step_are_one_row(tmp_path: Path) -> None:
    history = History(tmp_path)
    for point in course(9, evaluated=3):
        history.add(point)
        assert read_history(tmp_path / "history.csv") == history.points
    rows = cells(tmp_path / "history.csv")
    assert [row["step"] for row in rows] == [str(n) for n in range(1, 10)]
    assert [bool(row["val_loss"]) for row in rows] == [False, False, True] * 3
    assert all(row["loss"] and row["learning_rate"] for row in rows)


def test_an_evaluation_that_comes_first_late_or_shorter_still_has_its_row(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.add(Point(10, 1.0, val_loss=2.123456789012345))
    history.add(Point(10, 1.0, val_loss=2.0, loss=1.0))  # a shorter row than the one it replaces
    history.add(Point(20, 2.0, loss=0.5))
    history.add(Point(10, 1.0, scores={"CIDEr": 0.5}))
    history.add(Point(5, 0.5, loss=3.0))
    history.add(Point(30, 3.0, loss=0.25))
    assert read_history(tmp_path / "history.csv") == [
        Point(5, 0.5, loss=3.0),
        Point(10, 1.0, loss=1.0, val_loss=2.0, scores={"CIDEr": 0.5}),
        Point(20, 2.0, loss=0.5),
        Point(30, 3.0, loss=0.25),
    ]


def test_a_score_with_another_name_becomes_a_column(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.add(Point(1, 0.1, loss=3.0))
    history.add(Point(2, 0.2, scores={"METEOR": 0.25, "words, distinct": 40.0}))
    history.add(Point(3, 0.3, scores={"METEOR": 0.5}))
    assert (tmp_path / "history.csv").read_text().splitlines()[0] == f'{NAMES},METEOR,"words, distinct"'
    assert [point.scores for point in read_history(tmp_path / "history.csv")] == [
        {},
        {"METEOR": 0.25, "words, distinct": 40.0},
        {"METEOR": 0.5},
    ]


def test_a_resumed_run_continues_after_its_checkpoint(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken ünd 犬"
    points = course(40, evaluated=10)
    unbroken = History(whole)
    first = History(broken)
    for point in points:
        unbroken.add(point)
        if point.step <= 27:
            first.add(point)
    with (broken / "history.csv").open("ab") as file:
        file.write(b"28,2.1,2.0")  # cut off by a kill
    resumed = History(broken, [point for point in read_history(broken / "history.csv") if point.step <= 20])
    assert [point.step for point in read_history(broken / "history.csv")] == list(range(1, 21))
    for point in points:
        if point.step > 20:
            resumed.add(point)
    assert (broken / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()
    assert [path.name for path in broken.iterdir()] == ["history.csv"]


def test_a_new_run_starts_with_an_empty_table(tmp_path: Path) -> None:
    History(tmp_path).add(Point(1, 0.1, loss=1.0))
    History(tmp_path)
    assert (tmp_path / "history.csv").read_text() == f"{NAMES}\n"
    assert read_history(tmp_path / "history.csv") == []


def test_the_next_point_repairs_a_file_that_others_changed(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    history = History(tmp_path)
    history.add(Point(1, 0.1, loss=1.0))
    path.unlink()
    history.add(Point(2, 0.2, loss=1.0))
    assert len(cells(path)) == 2
    path.write_text(path.read_text() + "notes of my own")
    history.add(Point(3, 0.3, loss=1.0))
    assert read_history(path) == history.points


def test_a_killed_run_leaves_complete_rows(tmp_path: Path) -> None:
    script = (
        "import sys; from capcli.training.output.history import History, Point\n"
        "history = History(sys.argv[1])\n"
        "for step in range(1, 10**9):\n"
        "    history.add(Point(step, step / 7, loss=step / 3))\n"
        "    history.add(Point(step, step / 7, val_loss=step / 3, scores={'CIDEr': 1 / step}))\n"
        "    step == 300 and print(flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    assert (tmp_path / "history.csv").read_text().endswith("\n")
    points = read_history(tmp_path / "history.csv")
    assert len(points) >= 300
    assert [point.step for point in points] == list(range(1, len(points) + 1))
    assert all(point.loss == point.step / 3 for point in points)
    assert all(point.scores == {"CIDEr": 1 / point.step} for point in points[:-1])


def test_many_points_stay_cheap(tmp_path: Path) -> None:
    """A point appends a row and does not rewrite the file."""
    history = History(tmp_path)
    inode = (tmp_path / "history.csv").stat().st_ino
    for point in course(3000, evaluated=1000):
        history.add(point)
    assert (tmp_path / "history.csv").stat().st_ino == inode
    assert read_history(tmp_path / "history.csv") == history.points


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CapcliError, match=r"file/history.csv cannot be written: .*; choose another --out"):
        History(tmp_path / "file")


def test_a_full_disk_does_not_end_training(tmp_path: Path) -> None:
    warnings: list[str] = []
    history = History(tmp_path, warn=warnings.append)
    history.add(Point(1, 0.1, loss=3.0))
    (tmp_path / "history.csv").unlink()
    (tmp_path / "history.csv").mkdir()  # which no file can replace
    history.add(Point(2, 0.2, loss=2.0))
    history.add(Point(3, 0.3, loss=1.0))
    assert len(warnings) == 1
    assert "history.csv cannot be written" in warnings[0]
    (tmp_path / "history.csv").rmdir()
    history.add(Point(4, 0.4, loss=0.5))
    assert [point.step for point in read_history(tmp_path / "history.csv")] == [1, 2, 3, 4]


@pytest.mark.parametrize(("text", "message"), DAMAGED.items(), ids=range(len(DAMAGED)))
def test_the_error_for_a_damaged_history_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "history.csv").write_text(text)
    with pytest.raises(CapcliError, match=message):
        read_history(tmp_path / "history.csv")


def test_a_history_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_bytes(b"step,epoch\n\xff\xfe\n")
    with pytest.raises(CapcliError, match="cannot be read"):
        read_history(tmp_path / "history.csv")


def test_a_missing_history_has_no_points(tmp_path: Path) -> None:
    assert read_history(tmp_path / "history.csv") == []


@pytest.mark.parametrize("count", [1, 300, 3000])
def test_curves_are_drawn(tmp_path: Path, count: int) -> None:
    assert draw_curves(str(tmp_path), course(count, evaluated=max(1, count // 10))) is None
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.width == 1080
        assert image.height > 900
    lines = {(0x35, 0x65, 0xC4), (0xE0, 0x7B, 0x29), (0x2F, 0x9D, 0x6A)}  # loss, validation loss, CIDEr
    assert lines <= colours(tmp_path / "curves.png")


def test_figures_without_points_have_no_panel(tmp_path: Path) -> None:
    heights = []
    for number, keep in enumerate([("loss",), ("loss", "learning_rate"), ("val_loss", "scores", "learning_rate")]):
        points = [Point(p.step, p.epoch, **{name: getattr(p, name) for name in keep}) for p in course(30, evaluated=5)]
        folder = tmp_path / str(number)
        folder.mkdir()
        assert draw_curves(str(folder), points) is None
        with Image.open(folder / "curves.png") as image:
            heights.append(image.height)
    assert heights[0] < heights[1] < heights[2]
    assert draw_curves(str(tmp_path), [Point(1, 0.1), Point(2, 0.2, loss=math.nan)]) is None
    assert not (tmp_path / "curves.png").exists()


def test_numbers_that_are_not_finite_are_recorded_and_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extreme = [math.nan, math.inf, -math.inf, 1e300, 0.0, -5.0, 1e-300]
    points = [Point(n, n / 7, loss=x, val_loss=x, learning_rate=x, scores={"CIDEr": x}) for n, x in enumerate(extreme)]
    history = History(tmp_path, points)
    assert draw_curves(str(tmp_path), history.points) is None
    assert (tmp_path / "curves.png").exists()
    assert capsys.readouterr().err == ""
    assert str(read_history(tmp_path / "history.csv")) == str(history.points)


def test_curves_that_cannot_be_drawn_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "curves.png").mkdir()
    assert str(draw_curves(str(tmp_path), course(5))).startswith("curves.png is not drawn: IsADirectoryError")
    for name in ("capcli.training.output.curves", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert str(draw_curves(str(tmp_path), course(5))).startswith("curves.png is not drawn: ")


def test_curves_are_drawn_after_new_points_and_a_warning_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = ReportCallback(mock.Mock(), History(tmp_path), mock.Mock(), str(tmp_path), "loss", list)
    state = TrainerState(log_history=[{"step": 1, "epoch": 0.5, "loss": 1.0}])
    given = (TrainingArguments(use_cpu=True, report_to="none"), state, TrainerControl())
    with mock.patch("capcli.training.loop.callbacks.draw_curves", return_value="no paper") as draw:
        for _ in range(2):
            callback.on_log(*given)
            callback.on_train_end(*given)
            callback.on_train_end(*given)
    assert draw.call_count == 2
    assert capsys.readouterr().err == "capcli: no paper\n"


def test_curves_do_not_depend_on_the_configuration_of_matplotlib(tmp_path: Path) -> None:
    points = course(50, evaluated=10)
    for name, changed in (("a", {}), ("b", {"text.usetex": True, "axes.facecolor": "black", "savefig.dpi": 30})):
        (tmp_path / name).mkdir()
        with matplotlib.rc_context(changed):
            assert draw_curves(str(tmp_path / name), points) is None
    assert (tmp_path / "a" / "curves.png").read_bytes() == (tmp_path / "b" / "curves.png").read_bytes()
