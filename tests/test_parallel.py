"""Parallel decode loops: together they do what one loop does, and they leave no thread or setting behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from captioners import eager, pictures, random_captioner
from fake_runtime import FakeRuntime, Trickle, image, settings
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from oracle import Case
from running import execute, paint
from test_loop import check, jobs_of, numbers_of, portions_of, shapes_of

from capcli.decoding.loop import IterableFeed, Job, decode
from capcli.decoding.parallel import SharedFeed, decode_in_parallel
from capcli.decoding.shapes import Shapes, useful_loops
from capcli.errors import CapcliError


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = torch.get_num_threads(), threading.active_count()
    yield
    assert (torch.get_num_threads(), threading.active_count()) == before


def fakes(count, before_step=lambda: None, **given):
    runtimes = [FakeRuntime(**given) for _ in range(count)]
    for runtime in runtimes:
        runtime.before_step = before_step
    return runtimes


def captioned(feed, runtimes, settings, shapes, shrunk=lambda _: None):
    return list(itertools.chain.from_iterable(decode_in_parallel(feed, runtimes, settings, shapes, shrunk)))


@hypothesis(max_examples=60, deadline=None)
@given(numbers_of, shapes_of, portions_of, st.integers(1, 4), st.integers(0, 2), st.sampled_from([1, 3, 6]))
def test_every_image_gets_its_own_caption_once(numbers, shapes, portions, loops, lag, most):
    thread, feed = threading.get_ident(), Trickle(jobs_of(numbers), portions)

    def on_take(_wait):
        assert threading.get_ident() == thread, "the feed is called in another thread"

    feed.on_take = on_take
    check(captioned(feed, fakes(loops, lag=lag), settings(most), shapes), numbers, most)


def test_all_loops_run_at_once():
    first_steps = threading.Barrier(3, timeout=30)  # a loop that waited for another one to end would never pass
    stepped = set()

    def meet():
        if threading.get_ident() not in stepped:
            stepped.add(threading.get_ident())
            first_steps.wait()

    check(captioned(Trickle(jobs_of(range(40))), fakes(3, meet), settings(), Shapes(2, 1)), list(range(40)))
    assert len(stepped) == 3


@hypothesis(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=25), shapes_of, st.sets(st.integers(2, 30), max_size=3))
def test_a_loop_that_runs_out_of_memory_continues_with_half_the_slots(numbers, shapes, failing):
    thread, smaller = threading.get_ident(), []

    def shrunk(fewer):
        assert threading.get_ident() == thread
        smaller.append(fewer)

    runtimes = fakes(2, fails=failing.__contains__)
    try:
        done = captioned(Trickle(jobs_of(numbers)), runtimes, settings(), replace(shapes, loops=2), shrunk)
    except CapcliError:
        assert any(each.shapes.slots == 1 for each in runtimes)
    else:
        check(done, numbers)
    assert all(each.loops == 2 and each.slots < max(2, shapes.slots) for each in smaller)


def test_an_error_in_a_loop_is_raised_in_the_callers_thread():
    runtimes = fakes(2)

    def fail():
        if runtimes[1].steps == 3:
            raise ZeroDivisionError("in a loop")

    runtimes[1].before_step = fail
    with pytest.raises(ZeroDivisionError, match="in a loop"):
        captioned(Trickle(jobs_of([4] * 60)), runtimes, settings(), Shapes(2, 1))


def test_an_error_in_the_feed_stops_the_loops():
    feed = Trickle(jobs_of([4] * 60))

    def fail(_wait):
        if feed.taken > 20:
            raise OSError("no such folder any more")

    feed.on_take = fail
    with pytest.raises(OSError, match="any more"):
        captioned(feed, fakes(2), settings(), Shapes(2, 1))


def test_closing_the_generator_stops_the_loops():
    feed = Trickle(jobs_of([4] * 2000))
    decoding = decode_in_parallel(feed, fakes(2), settings(), Shapes(2, 2))
    next(done for done in decoding if done)
    decoding.close()
    assert feed.taken < 1000


def test_an_interrupt_does_not_cut_the_wait_for_loops_short():
    slow = fakes(2, lambda: time.sleep(0.2))  # they are always in a step when they are stopped
    decoding = decode_in_parallel(Trickle(jobs_of([4] * 60)), slow, settings(), Shapes(2, 2))
    next(done for done in decoding if done)
    impatient = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    impatient.start()
    decoding.close()
    impatient.join()


def test_a_waiting_loop_gets_images_that_arrive_late():
    jobs = SharedFeed(4)
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(jobs.take(4, None)))
    waiting.start()
    jobs.put([Job(0, image(1))])
    assert jobs.take(4, 0) == [], "more may come"
    while waiting.is_alive():
        jobs.put([])
    assert [job.tag for job in taken[0]] == [0]
    jobs.put([Job(n, image(1)) for n in range(4)])
    assert len(jobs.take(3, 0)) == 3, "there are enough"
    assert jobs.take(3, 0) == []
    assert not jobs.ended
    jobs.close()
    assert not jobs.ended
    assert len(jobs.take(3, 0)) == 1
    assert jobs.ended
    assert jobs.take(4, None) == []


@pytest.mark.parametrize("case", [{}, {"num_beams": 4}, {"do_sample": True, "seed": 3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captions_of_parallel_loops_equal_those_of_one_loop_to_the_bit(case, dtype):
    model = random_captioner(dtype=dtype)
    search = Case({"max_new_tokens": 9, **case}).settings(model)
    jobs = [Job(i, each, key=i) for i, each in enumerate(pictures(40))]
    shapes = Shapes(5, 2)
    alone = {d.tag: d.hypotheses for d in decode(IterableFeed(jobs), eager(model), search, shapes)}
    parallel = {d.tag: d.hypotheses for d in captioned(Trickle(jobs), eager(model).replicas(3), search, shapes)}
    assert parallel == alone
    assert len({str(each) for each in alone.values()}) > 10


def test_loops_share_the_threads_evenly_and_each_has_enough_images():
    assert [useful_loops(threads, None) for threads in (1, 2, 3, 4, 5, 6, 7, 11, 16)] == [
        1,
        2,
        3,
        4,
        4,
        3,
        3,
        2,
        4,
    ]
    assert [useful_loops(2, images) for images in (1, 5, 15, 16, 10**9)] == [1, 1, 1, 2, 2]
    assert [useful_loops(8, images) for images in (15, 16, 24, 32)] == [1, 2, 2, 4]


@pytest.mark.slow
def test_the_command_writes_the_same_file_with_several_loops(captioner: Path, tmp_path: Path) -> None:
    folder = paint(tmp_path / "photos", *(f"{number}.png" for number in range(40)))
    given = ("--model", captioner, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 8)
    for threads in (1, 2):
        out = tmp_path / f"{threads}.jsonl"
        done = execute("caption", folder, *given, "--threads", threads, "--out", out)
        assert done.code == 0, done.err
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()
    run_files = [json.loads((tmp_path / f"{threads}.run.json").read_text()) for threads in (1, 2)]
    assert [run_file["shapes"]["loops"] for run_file in run_files] == [1, 2]
    small = execute("caption", folder, *given, "--threads", 2, "--limit", 5, "--out", tmp_path / "5.jsonl")
    assert small.code == 0
    assert json.loads((tmp_path / "5.run.json").read_text())["shapes"]["loops"] == 1
