"""history.csv is exact and whole at every instant, a resumed run goes on from its checkpoint's points, curves.png is drawn."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capcli.errors import CapcliError
from capcli.training.output.history import History, Point, read_history

NAMES = "step,epoch,loss,val_loss,learning_rate,grad_norm,images_per_second,CIDEr,Bleu_1,Bleu_2,Bleu_3,Bleu_4,ROUGE_L"
DAMAGED = {
    "Dear all,\nno table\n": "no history",
    "": "no history",
    "step,epoch,loss\n1,0.5,lots\n2,0.5,2.0\n": "line 2",
    "step,epoch,loss\n1,0.5,2.0\n2,0.5\n3,0.5,2.0\n": "line 3",
    "step,epoch,loss\nfirst,0.5,2.0\n2,0.5,2.0\n": "line 2",
}


def course(count: int, *, evaluated: int = 0) -> list[Point]:
    """Points of a run that learns: a loss at every step, and at each `evaluated` one a measurement."""
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


def test_numbers_come_back_to_the_bit(tmp_path: Path):
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


def test_a_training_point_and_an_evaluation_of_one_step_are_one_row(tmp_path: Path):
    history = History(tmp_path)
    for point in course(9, evaluated=3):
        history.add(point)
        assert read_history(tmp_path / "history.csv") == history.points
    rows = cells(tmp_path / "history.csv")
    assert [row["step"] for row in rows] == [str(n) for n in range(1, 10)]
    assert [bool(row["val_loss"]) for row in rows] == [False, False, True] * 3
    assert all(row["loss"] and row["learning_rate"] for row in rows)


def test_an_evaluation_that_comes_first_late_or_shorter_still_has_its_row(tmp_path: Path):
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


def test_a_score_of_another_name_becomes_a_column(tmp_path: Path):
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


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path: Path):
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


def test_a_new_run_starts_an_empty_table(tmp_path: Path):
    History(tmp_path).add(Point(1, 0.1, loss=1.0))
    History(tmp_path)
    assert (tmp_path / "history.csv").read_text() == f"{NAMES}\n"
    assert read_history(tmp_path / "history.csv") == []


def test_what_others_do_to_the_file_is_mended_by_the_next_point(tmp_path: Path):
    path = tmp_path / "history.csv"
    history = History(tmp_path)
    history.add(Point(1, 0.1, loss=1.0))
    path.unlink()
    history.add(Point(2, 0.2, loss=1.0))
    assert len(cells(path)) == 2
    path.write_text(path.read_text() + "notes of my own")
    history.add(Point(3, 0.3, loss=1.0))
    assert read_history(path) == history.points


def test_a_killed_run_leaves_whole_rows(tmp_path: Path):
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


def test_many_points_stay_cheap(tmp_path: Path):
    """The file is written once more for every point, not all of it: 30,000 rows of it would be gigabytes."""
    history = History(tmp_path)
    inode = (tmp_path / "history.csv").stat().st_ino
    for point in course(30_000, evaluated=1000):
        history.add(point)
    assert (tmp_path / "history.csv").stat().st_ino == inode
    assert read_history(tmp_path / "history.csv") == history.points


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CapcliError, match=r"file/history.csv cannot be written: .*; choose another --out"):
        History(tmp_path / "file")


def test_a_full_disk_does_not_end_training(tmp_path: Path):
    said: list[str] = []
    history = History(tmp_path, warn=said.append)
    history.add(Point(1, 0.1, loss=3.0))
    (tmp_path / "history.csv").unlink()
    (tmp_path / "history.csv.tmp").mkdir()  # where the file would be made anew
    history.add(Point(2, 0.2, loss=2.0))
    history.add(Point(3, 0.3, loss=1.0))
    assert len(said) == 1
    assert "history.csv cannot be written" in said[0]
    (tmp_path / "history.csv.tmp").rmdir()
    history.add(Point(4, 0.4, loss=0.5))
    assert [point.step for point in read_history(tmp_path / "history.csv")] == [1, 2, 3, 4]


@pytest.mark.parametrize(("text", "told"), DAMAGED.items(), ids=range(len(DAMAGED)))
def test_a_damaged_history_is_told_with_its_line(tmp_path: Path, text: str, told: str):
    (tmp_path / "history.csv").write_text(text)
    with pytest.raises(CapcliError, match=told):
        read_history(tmp_path / "history.csv")


def test_bytes_that_are_no_text_are_told(tmp_path: Path):
    (tmp_path / "history.csv").write_bytes(b"step,epoch\n\xff\xfe\n")
    with pytest.raises(CapcliError, match="cannot be read"):
        read_history(tmp_path / "history.csv")


def test_no_history_is_no_points(tmp_path: Path):
    assert read_history(tmp_path / "history.csv") == []


@pytest.mark.parametrize("count", [1, 3, 300, 30_000])
def test_curves_are_drawn(tmp_path: Path, count: int):
    history = History(tmp_path, course(count, evaluated=max(1, count // 10)))
    history.draw()
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.width == 1080
        assert image.height > 900
    lines = {(0x35, 0x65, 0xC4), (0xE0, 0x7B, 0x29), (0x2F, 0x9D, 0x6A)}  # loss, validation loss, CIDEr
    assert lines <= colours(tmp_path / "curves.png")


def test_only_what_there_is_gets_a_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    heights = []
    for number, keep in enumerate(
        [("loss",), ("val_loss",), ("loss", "learning_rate"), ("loss", "scores", "learning_rate")]
    ):
        points = [Point(p.step, p.epoch, **{name: getattr(p, name) for name in keep}) for p in course(30, evaluated=5)]
        History(tmp_path / str(number), points).draw()
        with Image.open(tmp_path / str(number) / "curves.png") as image:
            heights.append(image.height)
    assert heights[0] == heights[1] < heights[2] < heights[3]
    History(tmp_path / "none", [Point(1, 0.1), Point(2, 0.2, loss=math.nan)]).draw()
    assert not (tmp_path / "none" / "curves.png").exists()
    assert capsys.readouterr().err == ""


def test_numbers_that_are_none_do_not_end_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wild = [math.nan, math.inf, -math.inf, 1e300, 0.0, -5.0, 1e-300]
    points = [Point(n, n / 7, loss=x, val_loss=x, learning_rate=x, scores={"CIDEr": x}) for n, x in enumerate(wild)]
    history = History(tmp_path, points)
    history.draw()
    assert (tmp_path / "curves.png").exists()
    assert capsys.readouterr().err == ""
    assert str(read_history(tmp_path / "history.csv")) == str(history.points)


def test_a_picture_that_cannot_be_drawn_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    history = History(tmp_path, course(5), warn=said.append)
    (tmp_path / "curves.png").mkdir()
    history.draw()
    history.draw()
    assert len(said) == 1
    assert said[0].startswith("curves.png is not drawn: ")
    for name in ("capcli.training.output.curves", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    history.draw()
    assert said[1] == "curves.png is not drawn, matplotlib is missing: pip install 'capcli[train]'"


def test_curves_are_drawn_alike_whatever_matplotlib_was_told(tmp_path: Path):
    points = course(50, evaluated=10)
    History(tmp_path / "a", points).draw()
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "savefig.dpi": 30}):
        History(tmp_path / "b", points).draw()
    assert (tmp_path / "a" / "curves.png").read_bytes() == (tmp_path / "b" / "curves.png").read_bytes()
