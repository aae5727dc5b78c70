"""The real command ended in every way, then run again: the files equal those of an uninterrupted run, byte for byte."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from running import call, ended, execute, paint, save_captioner, size, spawn, wait_until

NAMES = [f"{n // 30}/{n:03d}{('.png', '.jpg', '.webp', '.gif')[n % 4]}" for n in range(150)]
AWKWARD = ["0/new\nline.png", "1/\n\n.jpg", '2/"quoted", twice.png', b"3/caf\xe9.png", "4/two  spaces.gif"]
BROKEN = ["0/007a.png", "2/broken\nname.jpg", "4/149z.png"]
CAPTIONS, FAILURES = len(NAMES) + len(AWKWARD), len(BROKEN)
FINISHING = re.compile(
    r"capcli: interrupted; finishing the (\d+ images|image) under way(, which takes about \d+ s)? "
    r"\(interrupt again to exit at once\)"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many pictures, some with awkward names, some broken."""
    folder = paint(tmp_path_factory.mktemp("many"), *NAMES, *AWKWARD)
    for name in BROKEN:
        (folder / name).write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("few"), *(f"{n}.png" for n in range(9)))


def outputs(out: Path) -> tuple[bytes, bytes]:
    """The captions and the failures that a run wrote."""
    failures = out.with_suffix(".failures.jsonl")
    return out.read_bytes(), failures.read_bytes() if failures.exists() else b""


def run_file(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.with_suffix(".run.json").read_text())
    return found


def is_loading(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process imports torch, or has imported it."""
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def is_prefix(part: bytes, whole: bytes) -> bool:
    """Whether the complete lines of `part` are the first lines of `whole`."""
    return whole.startswith(part[: part.rfind(b"\n") + 1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("suffix", "kills", "search"),
    [
        (".jsonl", ["loading", random.uniform(0, 0.5), random.uniform(0.5, 0.9)], []),
        (".csv", [random.uniform(0, 0.9)], ["--do-sample", "--seed", 3, "--num-return-sequences", 2]),
        (".jsonl", [random.uniform(0, 0.9)], ["--threads", 2]),
    ],
    ids=["json lines", "csv, sampled", "two loops"],
)
def test_killed_at_any_moment_the_same_command_completes_the_same_bytes(
    captioner: Path, photos: Path, tmp_path: Path, suffix: str, kills: list[float | str], search: list[object]
):
    command = ["caption", photos, "-m", captioner, *search, "-o"]
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"killed{suffix}"
    assert call(*command, whole).code == 3
    captions, failures = outputs(whole)
    for kill in kills:  # while the model loads, or when this part of the captions is written
        process = spawn(*command, out)
        least = 0 if isinstance(kill, str) else max(size(out), int(kill * len(captions))) + 1
        wait_until(lambda: size(out) >= least and is_loading(process), process)  # noqa: B023
        os.killpg(process.pid, signal.SIGKILL)
        ended(process)
        if out.exists() and suffix == ".jsonl":  # CSV gains a column with the first name that is not UTF-8
            assert is_prefix(outputs(out)[0], captions), kills
            assert is_prefix(outputs(out)[1], failures), kills
    rerun = call(*command, out)
    assert rerun.code == 3, (kills, rerun.err)
    assert outputs(out) == (captions, failures), kills
    assert run_file(out)["counts"] == run_file(whole)["counts"] == {"captions": CAPTIONS, "failures": FAILURES}
    assert run_file(out)["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "number", "folders"),
    [(1, signal.SIGINT, "012"), (2, signal.SIGTERM, "01234")],
    ids=["SIGINT", "SIGTERM, two loops"],
)
def test_an_interrupted_run_finishes_what_is_under_way(
    captioner: Path, photos: Path, tmp_path: Path, threads: int, number: signal.Signals, folders: str
):
    batch = 8 if threads == 1 else 16  # enough for two loops
    slow = [
        "--batch-size",
        batch,
        "--max-new-tokens",
        50,
    ]  # so that the signal comes before the last image is in the batch
    command = ["caption", *(photos / name for name in folders), "-m", captioner, "--threads", threads, *slow, "-o"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "c.jsonl"
    assert call(*command, whole).code == 3
    process = spawn(*command, out)
    wait_until(lambda: size(out) > 0, process)
    os.killpg(process.pid, number)
    interrupted = ended(process)
    assert interrupted.code == 128 + number
    rows, failures = outputs(out)
    assert rows.endswith(b"\n")
    assert is_prefix(rows, whole.read_bytes())
    count, failed = rows.count(b"\n"), failures.count(b"\n")
    total = whole.read_bytes().count(b"\n")
    assert 0 < count < total
    lines = interrupted.err.splitlines()  # with progress where the machine is slow
    assert any(FINISHING.fullmatch(line) for line in lines)
    assert lines[-2].startswith(f"{count} captioned, 0 skipped, {failed} failed")
    assert re.fullmatch(rf"interrupted: {count}( of \d+)? captioned; the same command goes on", lines[-1])
    assert run_file(out)["state"] == "interrupted"
    assert run_file(out)["shapes"]["loops"] == threads
    assert run_file(out)["counts"] == {"captions": count, "failures": failed}
    assert call(*command, out).code == 3
    assert outputs(out) == outputs(whole)
    assert run_file(out)["last_run"]["captioned"] == total - count


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_a_second_interrupt_ends_the_run_at_once(captioner: Path, photos: Path, tmp_path: Path, threads: int):
    out = tmp_path / "c.jsonl"
    slow = ["--batch-size", 64, "--max-new-tokens", 50, "--threads", threads]  # so that much is under way at any time
    process = spawn("caption", photos, "-m", captioner, *slow, "-o", out)
    wait_until(lambda: size(out) > 0, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    assert FINISHING.fullmatch(process.stderr.readline().decode().strip())
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    done = ended(process)
    assert done.code == 130
    assert time.monotonic() - began < 5.0  # a second, on a machine that does nothing else
    assert re.fullmatch(r"interrupted: \d+( of \d+)? captioned; the same command goes on", done.err.strip())
    assert out.read_bytes().endswith(b"\n")
    assert run_file(out)["state"] == "running"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_an_interrupt_while_the_model_loads_ends_the_run_at_once(captioner: Path, few: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    process = spawn("caption", few, "-m", captioner, "-o", out)
    wait_until(lambda: is_loading(process), process)
    os.killpg(process.pid, signal.SIGINT)
    done = ended(process)
    assert (done.code, done.out, done.err.strip()) == (130, b"", "capcli: interrupted")
    assert not out.exists()


def test_a_full_disk_ends_the_run_and_leaves_complete_rows(captioner: Path, photos: Path, tmp_path: Path):
    command = ["caption", photos, "-m", captioner, "-o"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "c.jsonl"
    assert call(*command, whole).code == 3

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    full = execute(*command, out, preexec_fn=limit_file_size)
    assert full.code == 1
    error = full.err.splitlines()[-1]
    assert error.startswith(f"capcli: cannot write {out}: File too large")
    assert error.endswith("All rows in it are complete; the same command resumes the run")
    assert "Traceback" not in full.err
    rows = out.read_bytes()
    assert rows.endswith(b"\n")
    assert 4000 < len(rows) <= 6000
    assert is_prefix(rows, whole.read_bytes())
    assert call(*command, out).code == 3
    assert outputs(out) == outputs(whole)


def test_other_settings_are_refused_and_named(captioner: Path, few: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    command = ["caption", few, "-o", out, "-m"]
    assert call(*command, captioner, "--limit", 3).code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = save_captioner(tmp_path / "other", seed=1)
    other_dtype = "float32" if run_file(out)["settings"]["dtype"] == "bfloat16" else "bfloat16"
    for changed, message in (
        ([captioner, "--num-beams", 2], "num_beams was 1, is now 2"),
        ([captioner, "--max-new-tokens", 5], "max_new_tokens was 12, is now 5"),
        ([captioner, "--do-sample"], "do_sample was false, is now true"),
        ([captioner, "--prompt", "word30"], "prompt was [118], is now [118, 30]"),
        ([captioner, "--keep-prompt"], "keep_prompt was false, is now true"),
        ([captioner, "--fields", "width"], 'fields was [], is now ["width"]'),
        ([captioner, "--dtype", other_dtype], f'is now "{other_dtype}"'),
        ([other], "model was"),
    ):
        refused = call(*command, *changed)
        assert refused.code == 2, changed
        assert message in refused.err
        assert "was started with other settings" in refused.err
        assert "--overwrite" in refused.err
        assert {path: path.read_bytes() for path in before} == before


def test_a_rerun_continues_with_options_that_do_not_change_captions(captioner: Path, few: Path, tmp_path: Path):
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
    assert run_file(out)["counts"] == {"captions": 12, "failures": 0}


def test_a_second_source_changes_no_name_of_the_first(captioner: Path, few: Path, tmp_path: Path):
    more = paint(tmp_path / "more", "a.png", "b.png", seed=2)
    out = tmp_path / "c.jsonl"
    command = ["caption", "-m", captioner, "-o", out]
    assert call(*command, few).code == 0
    assert "2 captioned, 9 skipped" in call(*command, few, more).err
    assert "0 captioned, 9 skipped" in call(*command, few).err
    names = [row["file_name"] for row in map(json.loads, out.open())]
    assert names == [f"{n}.png" for n in range(9)] + [os.path.relpath(more / name, few) for name in ("a.png", "b.png")]


def test_the_batch_size_of_a_finished_run_on_a_few_images_is_not_kept(captioner: Path, few: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    command = ["caption", few, "-m", captioner, "-o", out]
    assert call(*command, "--limit", 2).code == 0
    assert run_file(out)["shapes"]["slots"] == 2
    assert call(*command).code == 0
    assert run_file(out)["shapes"]["slots"] == 7


def test_a_setting_without_effect_does_not_refuse_a_rerun(captioner: Path, few: Path, tmp_path: Path):
    command = ["caption", few, "-m", captioner, "-o", tmp_path / "c.jsonl"]
    assert "--seed has no effect" in call(*command, "--seed", 3, "--limit", 2).err
    assert call(*command).code == 0


def test_a_rerun_of_a_finished_run_writes_no_rows(captioner: Path, tmp_path: Path):
    photos, out = paint(tmp_path / "photos", *(f"{n}.png" for n in range(3))), tmp_path / "c.csv"
    (photos / "broken.png").write_bytes(b"no picture")
    command = ["caption", photos, "-m", captioner, "-o", out]
    first = call(*command)
    before = outputs(out), out.stat().st_mtime_ns
    again = call(*command)
    assert first.code == again.code == 3
    assert (outputs(out), out.stat().st_mtime_ns) == before
    assert again.err.startswith("0 captioned, 4 skipped, 0 failed")
    assert run_file(out)["counts"] == {"captions": 3, "failures": 1}


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
