"""Loading with real processes: a hostile image is one failure; order and bounds hold; no process is left behind."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import misbehaving
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capcli.errors import CapcliError
from capcli.loading import default_workers, dispatch, load, loader, usable_cpus, window
from capcli.loading.window import Task, Window
from capcli.loading.worker import Worker
from capcli.records import Entry, Failure, Loaded

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TESTS = Path(__file__).parent
MEGABYTE = 1 << 20
PATIENCE = 60.0  # seconds that a busy machine may take; what must not be waited for takes longer


def entries_of(*actions: str) -> list[Entry]:
    return [Entry(f"image {number}", f"{action}:{number}") for number, action in enumerate(actions)]


def results(*actions: str, workers: int = 2, timeout: float = 30, **bounds: Any) -> list[Loaded | Failure]:
    with load(entries_of(*actions), misbehaving.decode, workers=workers, timeout=timeout, **bounds) as images:
        return list(images)


def outcome(result: Loaded | Failure) -> str:
    return result.error if isinstance(result, Failure) else "ok"


def assert_whole(got: list[Loaded | Failure]) -> None:
    """One result per entry, in order, each with its own pixels."""
    assert [result.name for result in got] == [f"image {number}" for number in range(len(got))]
    for number, result in enumerate(got):
        if isinstance(result, Loaded):
            assert result.facts["number"] == number
            assert (result.pixels == misbehaving.picture(number)).all()


def children(parent: int) -> set[int]:
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = status.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(ppid) == parent:
            found.add(int(status.parent.name) if state != "Z" else -int(status.parent.name))
    return found


def loading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("capcli")]


def eventually(condition: Callable[[], object], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a process, a zombie, a thread or a file descriptor behind."""
    if sys.platform != "linux":
        yield
        return
    before = children(os.getpid()), len(os.listdir("/proc/self/fd"))
    yield
    assert eventually(lambda: not loading_threads()), loading_threads()
    assert (children(os.getpid()), len(os.listdir("/proc/self/fd"))) == before


# Order, and results of every kind


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers: int) -> None:
    got = results(*(f"sleep:{0.02 * (number * 7 % 5)}" for number in range(20)), workers=workers)
    assert len(got) == 20
    assert {outcome(result) for result in got} == {"ok"}
    assert_whole(got)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_entries(workers: int) -> None:
    images = load([], misbehaving.decode, workers=workers)
    assert images.take() is None
    assert images.done
    assert list(images) == []


HOSTILE = {
    "kill:SIGSEGV": ("crash", "decoding crashed: the process was ended by SIGSEGV"),
    "kill:SIGKILL": ("crash", "decoding crashed: the process was ended by SIGKILL"),
    "kill:SIGRTMIN": ("crash", "decoding crashed: the process was ended by"),
    "exit:3": ("crash", "decoding crashed: the process exited with code 3"),
    "exit:0": ("crash", "decoding crashed: the process exited with code 0"),
    "system-exit:": ("crash", "decoding crashed: the process exited with code 7"),
    "allocate:100000": ("out-of-memory", "decoding needs more memory"),
    "raise:image": ("missing", "it is not there"),
    "raise:value": ("unreadable", "ValueError: odd \udcff"),
    "raise:unpicklable": ("unreadable", "UnpicklableError: line one line two"),
    "raise:unprintable": ("unreadable", "UnprintableError: no message"),
    "raise:recursion": ("unreadable", "RecursionError: deep"),
    "raise:memory": ("out-of-memory", "decoding needs more memory"),
    "result:float": ("unreadable", "TypeError"),
    "result:flat": ("unreadable", "TypeError"),
    "result:grey": ("unreadable", "TypeError"),
    "result:text": ("unreadable", "TypeError"),
    "result:empty": ("unreadable", "TypeError"),
    "result:no-file": ("unreadable", "TypeError"),
    "invalid-facts:": ("unreadable", "TypeError"),
    "no-such-number:x:": ("unreadable", "ValueError"),
}


def test_each_hostile_image_is_one_failure() -> None:
    actions = [action for hostile in HOSTILE for action in ("ok:", hostile, "sleep:0.01")]
    got = results(*actions, memory=300 * MEGABYTE)
    assert [result.name for result in got] == [f"image {number}" for number in range(len(actions))]
    assert [outcome(result) for result in got[::3] + got[2::3]] == ["ok"] * (2 * len(HOSTILE))
    for (kind, message), result in zip(HOSTILE.values(), got[1::3], strict=True):
        assert isinstance(result, Failure)
        assert result.error == kind
        assert message in result.message
        assert "\n" not in result.message


def test_hanging_images_time_out() -> None:
    """One that sleeps, and one that never lets its own interpreter run again."""
    began = time.monotonic()
    got = results("ok:", "hang:", "ok:", "hold:", "ok:", "ok:", timeout=0.7)
    assert [outcome(result) for result in got] == ["ok", "timeout", "ok", "timeout", "ok", "ok"]
    assert_whole(got)
    assert time.monotonic() - began < PATIENCE


def test_an_image_is_timed_from_its_own_start() -> None:
    assert [outcome(result) for result in results(*["sleep:0.5"] * 4, workers=1, timeout=0.9)] == ["ok"] * 4


def test_time_in_which_the_parent_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()

    def leaping() -> float:
        now = time.monotonic()
        return now + 1000 if now > began + 0.3 else now

    monkeypatch.setattr(dispatch, "time", types.SimpleNamespace(monotonic=leaping))
    assert [outcome(result) for result in results("sleep:1", "ok:", workers=1, timeout=5)] == ["ok", "ok"]


@linux
def test_a_process_corrupted_by_one_image_does_not_fail_the_next() -> None:
    assert [outcome(result) for result in results("corrupt:", "crash-if-corrupt:", "ok:", workers=1)] == ["ok"] * 3
    for count in (1, 2):
        images = 3 * count  # at least one process decodes a third image, for which it has no memory left
        leaking = results(*["leak:90"] * images, workers=count, memory=200 * MEGABYTE)
        assert [outcome(result) for result in leaking] == ["ok"] * images


def test_a_codec_that_writes_to_the_socket_fails_its_own_image_only() -> None:
    assert [outcome(result) for result in results("ok:", "garble:", "ok:", workers=1)] == ["ok", "crash", "ok"]
    assert [outcome(result) for result in results("answer-often:", workers=1)] == ["missing"]


def test_in_place_and_in_processes_give_the_same() -> None:
    actions = ["ok:", "raise:image", "raise:value", "raise:memory", "result:flat", "ok:"] * 3
    in_place, in_processes = results(*actions, workers=0), results(*actions, workers=2)
    assert_whole(in_place)
    assert_whole(in_processes)
    assert [r for r in in_place if isinstance(r, Failure)] == [r for r in in_processes if isinstance(r, Failure)]


def test_images_of_any_size_and_layout_are_copied() -> None:
    actions = ["big:1", "result:strided", "big:40", "big:1", "ok:", "ok:", "big:8"]
    got = results(*actions, workers=1)
    sizes = [result.pixels.shape for result in got if isinstance(result, Loaded)]
    assert [shape[0] for shape in sizes] == [1024, 5, 40960, 1024, 9, 10, 8192]
    big = [result for action, result in zip(actions, got, strict=True) if action.startswith("big") and result]
    assert all((result.pixels == 7).all() for result in big if isinstance(result, Loaded))
    strided = got[1]
    assert isinstance(strided, Loaded)
    assert (strided.pixels == misbehaving.RESULTS["strided"]).all()
    strided.pixels[:] = 0  # writable, and not shared
    assert_whole(results("ok:", "ok:", "ok:"))


@pytest.mark.parametrize("workers", [0, 1])
def test_decode_may_return_the_bytes_of_a_file(workers: int) -> None:
    got = results("result:file", "ok:", "big:1", "result:file", workers=workers)
    assert [result.pixels.ndim for result in got if isinstance(result, Loaded)] == [1, 3, 3, 1]
    assert [r.pixels.tobytes() for r in (got[0], got[3]) if isinstance(r, Loaded)] == [b"the bytes of a file"] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_paths_may_have_any_characters(workers: int) -> None:
    names = ["caf\u00e9\n", "\udcff\udc80", "\ud800", "\U0001f600"]
    entries = [Entry(name, f"ok:{name}:{number}") for number, name in enumerate(names)]
    with load(entries, misbehaving.decode, workers=workers) as images:
        got = [result.facts["path"] for result in images if isinstance(result, Loaded)]
    assert got == [entry.path for entry in entries]


def test_a_path_too_long_to_exist_is_a_failure() -> None:
    entries = [Entry("a", "ok::0"), Entry("b", "x" * 10_000_000), Entry("c", "ok::2")]
    with load(entries, misbehaving.decode, workers=1) as images:
        assert [outcome(result) for result in images] == ["ok", "missing", "ok"]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["ok:", "ok:", "ok:", "sleep:0.03", "raise:value", "kill:SIGSEGV", "exit:1"]), max_size=9),
    st.integers(1, 3),
    st.integers(1, 12),
)
def test_one_result_per_entry_in_order(actions: list[str], workers: int, limit: int) -> None:
    expected = {"raise:value": "unreadable", "kill:SIGSEGV": "crash", "exit:1": "crash"}
    got = results(*actions, workers=workers, window=limit)
    assert_whole(got)
    assert [outcome(result) for result in got] == [expected.get(action, "ok") for action in actions]


# The window


@pytest.mark.parametrize("workers", [0, 2])
def test_results_are_available_while_entries_block(workers: int) -> None:
    more = threading.Event()

    def trickle() -> Iterator[Entry]:
        first, second, third = entries_of("ok:", "raise:value", "ok:")
        yield first
        yield second
        more.wait()
        yield third

    with load(trickle(), misbehaving.decode, workers=workers) as images:
        assert [outcome(next(images)), outcome(next(images))] == ["ok", "unreadable"]
        assert images.take(0.05) is None
        assert not images.done
        more.set()
        assert outcome(next(images)) == "ok"
        assert list(images) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_entries_comes_after_the_results_before_it(workers: int) -> None:
    def broken() -> Iterator[Entry]:
        yield from entries_of("sleep:0.1", "ok:")
        raise CapcliError("the list cannot be read")

    with load(broken(), misbehaving.decode, workers=workers) as images:
        assert [outcome(next(images)), outcome(next(images))] == ["ok", "ok"]
        assert not images.done
        with pytest.raises(CapcliError, match="the list cannot be read"):
            next(images)
        assert images.done


@pytest.mark.parametrize(("workers", "limit"), [(0, 3), (2, 6), (2, None)])
def test_entries_are_read_no_further_ahead_than_the_window(workers: int, limit: int | None) -> None:
    most = 4 * workers + 16 if limit is None else limit
    listed = taken = worst = 0

    def counted() -> Iterator[Entry]:
        nonlocal listed, worst
        for entry in entries_of("sleep:0.3", *["ok:"] * 60):
            listed += 1
            worst = max(worst, listed - taken)
            yield entry

    with load(counted(), misbehaving.decode, workers=workers, window=limit) as images:
        assert eventually(lambda: listed == most)
        time.sleep(0.1)
        assert listed == most
        for _ in images:
            taken += 1
            time.sleep(0.001)
    assert taken == listed == 61
    assert worst <= most + 1  # a result is handed over a moment before we count it


def test_the_window_bounds_the_pixels_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the bound only the image that all others wait for is started."""
    monkeypatch.setattr(window, "_MAX_BYTES", 50)
    queue = Window(10)
    queue.feed(entries_of(*["ok:"] * 6))
    first, second, third = (queue.next_task() for _ in range(3))
    assert isinstance(first, Task)
    assert isinstance(second, Task)
    assert isinstance(third, Task)
    queue.finish(second, Loaded("second", misbehaving.RESULTS["strided"]))
    assert queue.next_task() is None
    queue.put_back(first)
    queue.put_back(third)
    assert queue.next_task() is first
    assert queue.next_task() is None
    queue.finish(first, Failure("first", "crash", ""))
    assert [queue.take(0) is not None, queue.take(0) is not None, queue.take(0)] == [True, True, None]
    assert queue.next_task() is third


@given(st.permutations(range(8)))
def test_the_window_restores_any_order(order: list[int]) -> None:
    queue = Window(9)
    queue.feed(entries_of(*["ok:"] * 8))
    tasks = [task for _ in range(8) if (task := queue.next_task())]
    got = []
    for number in order:
        queue.finish(tasks[number], Failure(tasks[number].entry.name, "crash", ""))
        while (result := queue.take(0)) is not None:
            got.append(result.name)
    assert got == [entry.name for entry in entries_of(*["ok:"] * 8)]
    assert queue.done


# The processes


def test_few_images_start_few_processes() -> None:
    got = results("ok:", "ok:", "ok:", workers=8)
    assert len({result.facts["pid"] for result in got if isinstance(result, Loaded)}) <= 2


@linux
def test_workers_are_light_and_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    threads, torch_imported, _, _ = results("environment:OMP_NUM_THREADS", "modules:torch", "print:", "ok:")
    assert isinstance(threads, Loaded)
    assert isinstance(torch_imported, Loaded)
    assert bytes(threads.pixels[0, :, 0]) == b"1"
    assert torch_imported.pixels.sum() == 0
    assert capfd.readouterr() == ("", "")


@linux
def test_closing_early_ends_everything_soon(tmp_path: Path) -> None:
    def endless() -> Iterator[Entry]:
        number = 0
        while True:
            number += 1
            yield Entry("a", f"note:{tmp_path}:{number}")

    for end in ("close", "forget"):
        images = load(endless(), misbehaving.decode, workers=2, timeout=2 * PATIENCE)
        assert eventually(lambda: len(list(tmp_path.iterdir())) == 2)
        pids = [int(path.name) for path in tmp_path.iterdir()]
        assert children(os.getpid()) >= set(pids)
        began = time.monotonic()
        if end == "close":
            images.close()
            images.close()
            assert images.done
            assert images.take() is None
        else:
            del images
        assert time.monotonic() - began < PATIENCE  # the images under way would have taken twice that
        assert not any(alive(pid) for pid in pids)
        for path in tmp_path.iterdir():
            path.unlink()


def test_closing_does_not_wait_for_blocked_entries() -> None:
    release, resumed = threading.Event(), threading.Event()

    def stuck() -> Iterator[Entry]:
        release.wait(PATIENCE)
        resumed.set()
        yield from entries_of("ok:")

    for count in (0, 1):
        load(stuck(), misbehaving.decode, workers=count).close()
        assert not resumed.is_set()
    release.set()


def test_if_no_process_starts_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for executable in ("/nowhere/python", "/bin/false", ""):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(CapcliError, match="decoder processes cannot start"):
            results("ok:")


def test_a_decode_that_workers_cannot_import_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ghost = types.ModuleType("ghost")
    exec("def decode(path): return None", vars(ghost))
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    with load(entries_of("ok:"), ghost.decode, workers=1) as images, pytest.raises(CapcliError, match="ghost"):
        next(images)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        load(entries_of("ok:"), lambda path: misbehaving.decode(path), workers=1)


def test_fewer_processes_than_asked_for_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    started = 0

    class Scarce(Worker):
        def __init__(self, decode: bytes, memory: int | None) -> None:
            nonlocal started
            started += 1
            if started > 1:
                raise BlockingIOError("no more processes")
            super().__init__(decode, memory)

    monkeypatch.setattr(dispatch, "Worker", Scarce)
    assert_whole(results(*["ok:"] * 12, workers=4))
    assert started == 2


# Scripts: how a whole process ends


def script(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "script.py"
    prelude = f"""
        import sys
        sys.path[:0] = {[str(TESTS), str(TESTS.parent)]!r}
        print("started", flush=True)
        import os, misbehaving
        from capcli.loading import load
        from capcli.records import Entry
    """
    path.write_text(textwrap.dedent(prelude) + textwrap.dedent(body))
    return [sys.executable, "-W", "error", str(path)]


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kill the process when the test ends, so that a failure does not wait for it."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_a_script_without_a_main_guard_works(tmp_path: Path) -> None:
    body = """
        with load([Entry(str(n), f"print::{n}") for n in range(9)], misbehaving.decode, workers=2) as images:
            print(*(image.name for image in images))
    """
    done = subprocess.run(script(tmp_path, body), capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n") == ["started", "0 1 2 3 4 5 6 7 8", ""]
    assert done.stderr == ""


@linux
def test_a_script_that_closes_nothing_ends_quietly(tmp_path: Path) -> None:
    """Its entries are blocked on standard input, and a worker is in the middle of an image."""
    body = f"""
        def entries():
            yield Entry("a", "ok::0")
            yield Entry("b", "note:{tmp_path}:1")
            os.read(0, 1)
        images = load(entries(), misbehaving.decode, workers=1)
        print(next(images).name)
        while not any(name.isdigit() for name in os.listdir({str(tmp_path)!r})):
            pass
    """
    command = script(tmp_path, body)
    pipe = subprocess.PIPE
    with ended(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)) as process:
        assert process.wait(30) == 0  # standard input is still open
        assert process.stdout
        assert process.stderr
        assert (process.stdout.read(), process.stderr.read()) == (b"started\na\n", b"")
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir() if path.name.isdigit())


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_is_killed_or_interrupted_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    body = f"""
        with load([Entry("a", f"note:{tmp_path}:{{n}}") for n in range(9)], misbehaving.decode, workers=2) as images:
            next(images)
    """
    with ended(subprocess.Popen(script(tmp_path, body), stderr=subprocess.PIPE, start_new_session=True)) as process:
        assert eventually(lambda: len(list(tmp_path.glob("[0-9]*"))) == 2, 30)
        pids = [int(path.name) for path in tmp_path.glob("[0-9]*")]
        assert all(alive(pid) for pid in pids)
        opened = [os.readlink(fd) for pid in (process.pid, *pids) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        assert not [file for file in opened if file.startswith("/dev/shm")]
        os.killpg(process.pid, how)  # as the terminal does, to the whole group
        assert process.wait(PATIENCE) == -how
        assert eventually(lambda: not any(alive(pid) for pid in pids), 5)
        assert process.stderr
        assert process.stderr.read().decode().splitlines()[-1:] == (
            ["KeyboardInterrupt"] if how == signal.SIGINT else []
        )


# How many


def test_how_many_workers() -> None:
    assert [default_workers(cpus, on_gpu=False) for cpus in (1, 2, 8, 16, 64, 256)] == [1, 1, 1, 2, 4, 4]
    assert [default_workers(cpus, on_gpu=True) for cpus in (1, 2, 4, 16, 128)] == [1, 1, 2, 14, 32]
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000", None), ("250000 100000", 2), ("50000 100000", 1), ("?", None)]
)
def test_a_containers_quota_counts(tmp_path: Path, text: str, cpus: int | None) -> None:
    path = tmp_path / "cpu.max"
    path.write_text(text)
    assert loader.cpu_quota(str(path)) == cpus
    assert loader.cpu_quota(str(tmp_path / "none")) is None


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"workers": 1, "timeout": 0}, {"workers": 1, "window": 0}])
def test_wrong_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        load([], misbehaving.decode, **wrong)
