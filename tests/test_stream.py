"""Between loading and decoding: images become jobs as they arrive, failures are delivered at once, results in order."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from fake_runtime import Clock, FakeRuntime, caption, image, settings
from hypothesis import given
from hypothesis import strategies as st

from capcli.captioning import feed
from capcli.captioning.feed import ArrivalFeed, LocalArrivals, OrderedDelivery
from capcli.decoding.loop import Job, decode
from capcli.decoding.shapes import Shapes
from capcli.errors import ImageError
from capcli.records import Candidate, Caption, Failure, Loaded

NOTHING = None  # no arrival within the timeout


def bad(name: str) -> Failure:
    return Failure(name, "unreadable", "not an image")


def good(number: int) -> Loaded:
    return Loaded(f"{number}.png", image(number))


class Script:
    """Arrivals in a fixed order; `NOTHING` advances the clock by the timeout."""

    def __init__(self, arrivals, clock=None):
        self._left, self._clock = deque(arrivals), clock or Clock()
        self.timeouts = []

    @property
    def done(self) -> bool:
        return not self._left

    def take(self, timeout=None):
        self.timeouts.append(timeout)
        arrival = self._left.popleft()
        if arrival is NOTHING:
            self._clock.now += timeout
        return arrival


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(feed, "time", clock)
    return clock


def job(index: int, loaded: Loaded) -> Job:
    if loaded.pixels[0, 0, 0] == 13:
        raise ImageError("shape", "of another size")
    return Job(index, loaded.pixels)


def feed_of(arrivals, delivered=None, stop=lambda: False):
    return ArrivalFeed(arrivals, job, lambda i, r: (delivered if delivered is not None else []).append((i, r)), stop)


def test_jobs_and_failures_are_numbered_in_the_order_in_which_they_arrive():
    delivered = []
    feed = feed_of(Script([good(1), bad("x"), good(13), good(2)]), delivered)
    assert [j.tag for j in feed.take(9, 0)] == [0, 3]
    assert [(i, f.name, f.error) for i, f in delivered] == [(1, "x", "unreadable"), (2, "13.png", "shape")]
    assert feed.ended


def test_failures_are_delivered_while_the_feed_waits_for_an_image(clock):
    delivered, seen = [], []
    arrivals = Script([bad("a"), NOTHING, NOTHING, bad("b"), NOTHING, good(5)], clock)
    take = arrivals.take

    def watch(timeout):
        seen.append(len(delivered))
        return take(timeout)

    arrivals.take = watch
    assert [j.tag for j in feed_of(arrivals, delivered).take(4, None)] == [2]
    assert seen == [0, 1, 1, 1, 2, 2]


def test_the_feed_takes_no_more_arrivals_than_jobs_are_asked_for_failures_included():
    delivered = []
    feed = feed_of(Script([bad(f"{i}") for i in range(50)]), delivered)
    assert list(feed.take(4, 0)) == []
    assert len(delivered) == 4
    assert list(feed.take(4, None)) == []
    assert len(delivered) == 8
    assert not feed.ended


def test_available_images_are_taken_without_waiting_for_more(clock):
    arrivals = Script([good(1), good(2), NOTHING, good(3)], clock)
    assert len(feed_of(arrivals).take(4, None)) == 2
    assert clock.now == Clock.now


@pytest.mark.parametrize("wait", [0, 0.05, 0.7])
def test_the_feed_waits_no_longer_than_allowed(clock, wait):
    arrivals = Script([NOTHING] * 9, clock)
    assert list(feed_of(arrivals).take(4, wait)) == []
    assert clock.now - Clock.now == pytest.approx(wait)


def test_without_a_limit_the_feed_waits_and_checks_whether_to_stop(clock):
    checks = []
    arrivals = Script([NOTHING] * 50 + [good(4)], clock)
    assert len(feed_of(arrivals, stop=lambda: checks.append(1)).take(4, None)) == 1
    assert len(checks) == 51
    assert all(0 < t <= feed.POLL_SECONDS for t in arrivals.timeouts)


def test_after_a_stop_no_more_images_are_taken(clock):
    arrivals = Script([good(1), NOTHING, NOTHING, good(2), good(3)], clock)
    feed = feed_of(arrivals, stop=lambda: clock.now > Clock.now + 0.3)
    assert len(feed.take(1, None)) == 1
    assert list(feed.take(4, None)) == []  # stopped while it waited
    assert feed.ended
    assert not arrivals.done
    clock.now = Clock.now
    assert feed.ended, "a stop is final"


def test_after_a_stop_images_in_the_batch_are_finished():
    taken, delivered = [], []

    def make(index, loaded):
        taken.append(index)
        return job(index, loaded)

    feed = ArrivalFeed(
        Script([good(i) for i in range(9)]), make, lambda *r: delivered.append(r), lambda: len(taken) >= 4
    )
    done = list(decode(feed, FakeRuntime(), settings(), Shapes(3, 2)))
    assert {d.tag: d.hypotheses[0].tokens for d in done} == {i: caption(i) for i in range(4)}


def test_local_images_become_arrivals_and_their_errors_failures():
    def make(index, item):
        if item == "bad.png":
            raise ImageError("missing", "there is no such file")
        if index == 2:
            raise ImageError("unreadable", "not an image")
        return Loaded(str(index), np.zeros((2, 2, 3), np.uint8))

    arrivals = LocalArrivals(["a.png", "bad.png", object(), "c.png"], make)
    found = []
    while not arrivals.done:
        found.append(arrivals.take())
    assert [f and f.name for f in found] == ["0", "bad.png", "2", "3", None]
    assert [f.error for f in found[1:3]] == ["missing", "unreadable"]


def test_local_images_are_loaded_one_at_a_time():
    loaded = []
    feed = feed_of(LocalArrivals(range(100), lambda i, _: loaded.append(i) or good(i % 10)))
    feed.take(3, 0)
    assert loaded == [0, 1, 2]


@given(st.permutations(range(12)))
def test_results_are_delivered_in_order_and_as_soon_as_possible(order):
    out = []
    ordered = OrderedDelivery(lambda i, r: out.append((i, r)))
    for n, index in enumerate(order):
        ordered.put(index, Caption(str(index), (Candidate("text", 0.0),)))
        ready = next(i for i in range(13) if i not in order[: n + 1])
        assert [i for i, _ in out] == list(range(ready))
        assert all(r.name == str(i) for i, r in out)


@given(st.lists(st.one_of(st.integers(0, 40), st.just(NOTHING), st.just("bad")), max_size=30), st.integers(1, 5))
def test_for_any_arrivals_every_result_is_delivered_once_and_in_order(script, slots):
    arrivals = [bad("x") if x == "bad" else x if x is NOTHING else good(x) for x in script]
    expected = [x for x in script if x is not NOTHING]
    out = []
    ordered = OrderedDelivery(lambda i, r: out.append((i, r)))
    feed = ArrivalFeed(Script(arrivals), job, ordered.put, lambda: False)
    for done in decode(feed, FakeRuntime(), settings(), Shapes(slots, max(1, slots // 2))):
        ordered.put(done.tag, done.hypotheses[0].tokens)
    assert [i for i, _ in out] == list(range(len(expected)))
    for (_, result), x in zip(out, expected, strict=True):
        assert isinstance(result, Failure) if x in ("bad", 13) else result == caption(x)
