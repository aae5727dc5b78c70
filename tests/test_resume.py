"""A run that ends anywhere, in any way, and the same command after it: the file is the uninterrupted run's, byte for byte."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from running import Ended, call, change_json, ended, execute, paint, save_captioner, size, spawn, wait_until

NAMES = [f"{n // 60}/{n:03d}{('.png', '.jpg', '.webp', '.gif')[n % 4]}" for n in range(300)]
AWKWARD = ["0/new\nline.png", "1/\n\n.jpg", '2/"quoted", twice.png', b"3/caf\xe9.png", "4/two  spaces.gif"]
BROKEN = ["0/007a.png", "2/broken\nname.jpg", "4/299z.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred pictures, some with awkward names, some broken."""
    folder = paint(tmp_path_factory.mktemp("many"), *NAMES, *AWKWARD)
    for name in BROKEN:
        (folder / name).write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("few"), *(f"{n}.png" for n in range(9)))


def left(out: Path) -> tuple[bytes, bytes]:
    """What a run leaves: captions and failures."""
    failures = out.with_suffix(".failures.jsonl")
    return out.read_bytes(), failures.read_bytes() if failures.exists() else b""


def receipt(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.with_suffix(".run.json").read_text())
    return found


def is_loading(process: subprocess.Popen[bytes]) -> bool:
    """Whether torch is being imported or is there."""
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def is_prefix(part: bytes, whole: bytes) -> bool:
    """Whether the whole lines of a file are those that the uninterrupted run begins with."""
    return whole.startswith(part[: part.rfind(b"\n") + 1])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize(
    ("suffix", "kills", "search"),
    [
        (".jsonl", 3, []),
        (".csv", 2, []),
        (".jsonl", 2, ["--do-sample", "--seed", 3, "--num-return-sequences", 2]),
        (".jsonl", 2, ["--threads", 2]),
    ],
    ids=["json lines", "csv", "sampled", "two loops"],
)
def test_killed_at_any_moment_the_same_command_completes_the_same_bytes(
    captioner: Path, photos: Path, tmp_path: Path, suffix: str, kills: int, search: list[object]
):
    command = ["caption", photos, "-m", captioner, *search, "-o"]
    whole = tmp_path / f"whole{suffix}"
    assert call(*command, whole).code == 3
    captions, failures = left(whole)
    out = tmp_path / f"killed{suffix}"
    moments = sorted(random.uniform(0, 0.9) for _ in range(kills))
    for moment in [None, *moments]:  # the first while the model loads
        process = spawn(*command, out)
        at = 0 if moment is None else max(size(out), int(moment * len(captions))) + 1
        wait_until(lambda: size(out) >= at and is_loading(process), process)  # noqa: B023
        os.killpg(process.pid, signal.SIGKILL)
        ended(process)
        if out.exists() and suffix == ".jsonl":  # a table gains a column with the first name that is not UTF-8
            assert is_prefix(left(out)[0], captions), moments
            assert is_prefix(left(out)[1], failures), moments
    rerun = call(*command, out)
    assert rerun.code == 3, (moments, rerun.err)
    assert left(out) == (captions, failures), moments
    assert receipt(out)["counts"] == receipt(whole)["counts"] == {"captions": 305, "failures": 3}
    assert receipt(out)["state"] == "finished"


def interrupted(process: subprocess.Popen[bytes], out: Path, number: signal.Signals, least: int = 2000) -> Ended:
    """A run that gets a signal, as from a terminal, once so many bytes of rows are there."""
    wait_until(lambda: size(out) >= least, process)
    os.killpg(process.pid, number)
    return ended(process)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupted_run_finishes_what_is_under_way(captioner: Path, photos: Path, tmp_path: Path, threads: int):
    slow = ["--batch-size", 8, "--max-new-tokens", 50]  # so that the signal comes before all are under way
    command = ["caption", photos, "-m", captioner, "--threads", threads, *slow, "-o"]
    whole = tmp_path / "whole.jsonl"
    assert call(*command, whole).code == 3
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = tmp_path / f"{code}.jsonl"
        done = interrupted(spawn(*command, out), out, number)
        assert done.code == code
        said, closing = done.err.splitlines()
        assert said == "capcli: interrupted; finishing the work in progress (interrupt again to exit at once)"
        rows = out.read_bytes()
        assert rows.endswith(b"\n")
        assert is_prefix(rows, whole.read_bytes())
        count, failed = rows.count(b"\n"), left(out)[1].count(b"\n")
        assert 0 < count < 305
        assert closing.startswith(f"{count} captioned, 0 skipped, {failed} failed")
        assert receipt(out)["state"] == "interrupted"
        assert receipt(out)["counts"] == {"captions": count, "failures": failed}
        assert call(*command, out).code == 3
        assert left(out) == left(whole)
        assert receipt(out)["last_run"]["captioned"] == 305 - count


@pytest.mark.parametrize("threads", [1, 2])
def test_a_second_interrupt_leaves_at_once(captioner: Path, photos: Path, tmp_path: Path, threads: int):
    out = tmp_path / "c.jsonl"
    slow = ["--batch-size", 64, "--max-new-tokens", 50, "--threads", threads]  # much is under way at any time
    process = spawn("caption", photos, "-m", captioner, *slow, "-o", out)
    wait_until(lambda: size(out) > 2000, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    assert (
        process.stderr.readline()
        == b"capcli: interrupted; finishing the work in progress (interrupt again to exit at once)\n"
    )
    os.killpg(process.pid, signal.SIGINT)
    done = ended(process)
    assert (done.code, done.err.strip()) == (130, "")
    assert receipt(out)["state"] == "running"
    assert call("caption", photos, "-m", captioner, *slow, "-o", out).code == 3
    assert receipt(out)["counts"] == {"captions": 305, "failures": 3}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at processes through /proc")
def test_an_interrupt_while_the_model_loads_leaves_at_once(captioner: Path, few: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    process = spawn("caption", few, "-m", captioner, "-o", out)
    wait_until(lambda: is_loading(process), process)
    os.killpg(process.pid, signal.SIGINT)
    done = ended(process)
    assert (done.code, done.out, done.err.strip()) == (130, b"", "")
    assert not out.exists()


def test_a_full_disk_ends_the_run_and_leaves_whole_rows(captioner: Path, photos: Path, tmp_path: Path):
    command = ["caption", photos, "-m", captioner, "-o"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "c.jsonl"
    assert call(*command, whole).code == 3

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    full = execute(*command, out, preexec_fn=little)
    assert full.code == 1
    assert full.err.splitlines()[-1].startswith(f"capcli: cannot write {out}: File too large")
    assert "Traceback" not in full.err
    rows = out.read_bytes()
    assert rows.endswith(b"\n")
    assert 0 < len(rows) <= 12_000
    assert is_prefix(rows, whole.read_bytes())
    assert call(*command, out).code == 3
    assert left(out) == left(whole)


def test_other_settings_are_refused_and_named(captioner: Path, few: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    command = ["caption", few, "-o", out, "-m"]
    assert call(*command, captioner, "--limit", 3).code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = save_captioner(tmp_path / "other", seed=1)
    odd = "float32" if receipt(out)["settings"]["dtype"] == "bfloat16" else "bfloat16"
    for changed, said in (
        ([captioner, "--num-beams", 2], "num_beams was 1, is now 2"),
        ([captioner, "--max-new-tokens", 5], "max_new_tokens was 12, is now 5"),
        ([captioner, "--do-sample"], "do_sample was false, is now true"),
        ([captioner, "--prompt", "word30"], "prompt was [118], is now [118, 30]"),
        ([captioner, "--keep-prompt"], "keep_prompt was false, is now true"),
        ([captioner, "--fields", "width"], 'fields was [], is now ["width"]'),
        ([captioner, "--dtype", odd], f'is now "{odd}"'),
        ([other], "model was"),
    ):
        refused = call(*command, *changed)
        assert refused.code == 2, changed
        assert said in refused.err
        assert "--overwrite" in refused.err
        assert {path: path.read_bytes() for path in before} == before


def test_a_rerun_goes_on_whatever_does_not_change_captions(captioner: Path, few: Path, tmp_path: Path):
    more = paint(tmp_path / "more", *(f"{n}.png" for n in range(3)), seed=1)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "c.jsonl"
    exact = ["-m", captioner, "--dtype", "float32"]
    assert call("caption", few, more, *exact, "-o", whole).code == 0
    for changed in (
        [few / "0.png", few / "1.png", "--limit", 1],
        [few / "0.png", few / "1.png", "--batch-size", 3, "--threads", 1],
        [few, more, "--workers", 0, "--limit", 2],
        [few, more, "--decode-timeout", 9, "--max-pixels", 10**6, "--device", "cpu", "--limit", 5],
        [few, more, "--batch-size", 1, "--quiet"],
    ):
        assert call("caption", *changed, *exact, "-o", out).code == 0, changed
    texts = [[(row["file_name"], row["text"]) for row in map(json.loads, path.open())] for path in (out, whole)]
    assert texts[0] == texts[1]
    assert receipt(out)["counts"] == {"captions": 12, "failures": 0}


def test_a_second_source_changes_no_name_of_the_first(captioner: Path, few: Path, tmp_path: Path):
    more = paint(tmp_path / "more", "a.png", "b.png", seed=2)
    out = tmp_path / "c.jsonl"
    command = ["caption", "-m", captioner, "-o", out]
    assert call(*command, few).code == 0
    assert "2 captioned, 9 skipped" in call(*command, few, more).err
    assert "0 captioned, 9 skipped" in call(*command, few).err
    names = [row["file_name"] for row in map(json.loads, out.open())]
    assert names == [f"{n}.png" for n in range(9)] + [f"{more}/a.png", f"{more}/b.png"]


def test_a_try_on_a_few_images_does_not_shape_the_run_on_all(captioner: Path, few: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    command = ["caption", few, "-m", captioner, "-o", out]
    assert call(*command, "--limit", 2).code == 0
    assert receipt(out)["shapes"]["slots"] == 2
    assert call(*command).code == 0
    assert receipt(out)["shapes"]["slots"] == 7


def test_a_setting_without_effect_does_not_refuse_a_rerun(captioner: Path, few: Path, tmp_path: Path):
    command = ["caption", few, "-m", captioner, "-o", tmp_path / "c.jsonl"]
    assert "--seed has no effect" in call(*command, "--seed", 3, "--limit", 2).err
    assert call(*command).code == 0


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_that_is_done_writes_no_rows_again(captioner: Path, few: Path, tmp_path: Path, broken: bool):
    photos, out = tmp_path / "photos", tmp_path / "c.csv"
    shutil.copytree(few, photos)
    if broken:
        (photos / "broken.png").write_bytes(b"no picture")
    command = ["caption", photos, "-m", captioner, "-o", out]
    codes = {call(*command).code}
    before = left(out), out.stat().st_mtime_ns
    again = call(*command)
    assert codes | {again.code} == {3 if broken else 0}
    assert (left(out), out.stat().st_mtime_ns) == before
    assert again.err.startswith(f"0 captioned, {9 + broken} skipped, 0 failed")
    assert receipt(out)["counts"] == {"captions": 9, "failures": int(broken)}


def test_a_second_run_on_the_same_file_is_refused(captioner: Path, few: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    process = spawn("caption", "-", "-m", captioner, "-o", out, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(os.fsencode(few / "0.png") + b"\n")
    process.stdin.flush()
    wait_until(lambda: size(out) > 0, process)
    second = call("caption", few, "-m", captioner, "-o", out)
    assert second.code == 1
    assert str(out) in second.err
    assert second.err.count("\n") == 1
    assert ended(process).code == 0
    assert out.read_bytes().count(b"\n") == 1


def test_rows_without_their_receipt_are_not_gone_on_with(captioner: Path, few: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    command = ["caption", few, "-m", captioner, "-o", out]
    assert call(*command).code == 0
    rows = out.read_bytes()
    change_json(out.with_suffix(".run.json"), {"settings": {}})
    edited = call(*command)
    assert (edited.code, "was begun with other settings" in edited.err) == (2, True)
    out.with_suffix(".run.json").unlink()
    missing = call(*command)
    assert (missing.code, "no receipt" in missing.err) == (2, True)
    assert out.read_bytes() == rows
