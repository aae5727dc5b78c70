"""The decode loop: every image gets its own caption once, whenever it arrives and however much memory there is."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from captioners import captions, eager, pictures, random_captioner
from fake_runtime import BROKEN, WAVERING, Clock, FakeRuntime, Trickle, caption, image, settings
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from oracle import Case

from capcli.decoding import loop, noise
from capcli.decoding.activity import Activity
from capcli.decoding.loop import IterableFeed, Job, decode
from capcli.decoding.shapes import Shapes
from capcli.errors import CapcliError


def jobs_of(numbers):
    return [Job((i, n), image(n)) for i, n in enumerate(numbers)]


def check(done, numbers, most=6):
    """Every image is in `done` once, with its own caption; without one where it is not finite."""
    assert sorted(d.tag for d in done) == list(enumerate(numbers))
    for d in done:
        number = d.tag[1]
        if number == BROKEN or (number == WAVERING and most > 1):
            assert d.hypotheses == []
        else:
            assert d.hypotheses[0].tokens == caption(number, most)


numbers_of = st.lists(st.one_of(st.integers(0, 40), st.just(BROKEN), st.just(WAVERING)), max_size=30)
shapes_of = st.integers(1, 9).flatmap(lambda s: st.builds(Shapes, st.just(s), st.integers(1, s)))
portions_of = st.lists(st.integers(0, 3), max_size=40)
slow_of = st.none() | st.lists(st.integers(0, 9), max_size=20)


@hypothesis(deadline=None)
@given(numbers_of, shapes_of, portions_of, slow_of, st.integers(0, 3), st.integers(1, 3), st.sampled_from([1, 3, 6]))
def test_every_image_gets_its_own_caption_once(numbers, shapes, portions, slow, lag, beams, most):
    runtime, feed = FakeRuntime(lag, slow=slow), Trickle(jobs_of(numbers), portions)
    yielded = 0

    def on_take(wait):
        assert wait == 0 or sum(map(len, runtime.admitted)) == yielded, "waits while images are in slots"

    feed.on_take = on_take
    done = []
    for d in decode(feed, runtime, settings(most, beams), shapes):
        assert feed.taken - yielded <= shapes.slots + shapes.chunk, "takes too many jobs"
        yielded += 1
        done.append(d)
    check(done, numbers, most)


@hypothesis(deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=25),
    shapes_of,
    portions_of,
    slow_of,
    st.integers(0, 3),
    st.sets(st.integers(1, 30), max_size=3),
)
def test_out_of_memory_costs_slots_and_no_caption(numbers, shapes, portions, slow, lag, failing):
    runtime, shrunk, done = FakeRuntime(lag, failing.__contains__, slow), [], []
    try:
        done.extend(decode(Trickle(jobs_of(numbers), portions), runtime, settings(), shapes, shrunk.append))
    except CapcliError:
        assert runtime.shapes.slots == 1
    else:
        check(done, numbers)
    expected, slots = [], shapes.slots
    while slots > 1 and len(expected) < len(shrunk):
        slots //= 2
        expected.append(slots)
    assert [s.slots for s in shrunk] == expected
    assert all(s.chunk <= s.slots for s in shrunk)
    assert len({d.tag for d in done}) == len(done), "captioned twice"
    for d in done:
        assert d.hypotheses[0].tokens == caption(d.tag[1])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_every_out_of_memory_error_is_recognised(error):
    assert loop.out_of_memory(error)


def test_other_errors_are_raised():
    runtime = FakeRuntime()

    def breaks():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    runtime.before_step = breaks
    shrunk = []
    with pytest.raises(RuntimeError, match="mat1"):
        list(decode(IterableFeed(jobs_of([1])), runtime, settings(), Shapes(2, 2), shrunk.append))
    assert shrunk == []


def test_where_not_even_one_image_fits_the_error_says_so():
    with pytest.raises(CapcliError, match="not even one image"):
        list(decode(IterableFeed(jobs_of([1, 2])), FakeRuntime(fails=lambda _: True), settings(), Shapes(5, 2)))


def test_out_of_memory_restarts_images_in_their_order():
    runtime = FakeRuntime(
        fails={4}.__contains__
    )  # the first step, after allocate, encode and admit, while two more images wait
    done = list(decode(IterableFeed(jobs_of([3, 9, 14, 19, 24])), runtime, settings(), Shapes(3, 2)))
    check(done, [3, 9, 14, 19, 24])
    assert runtime.admitted == [[3, 9], [3], [9], [14], [19], [24]]


def test_out_of_memory_restarts_a_chunk_encoded_ahead_in_its_order():
    runtime = FakeRuntime(fails={5}.__contains__, slow=[])  # the second encoding, begun before the first step
    done = list(decode(IterableFeed(jobs_of([3, 9, 14, 19, 24])), runtime, settings(), Shapes(3, 2)))
    check(done, [3, 9, 14, 19, 24])
    assert runtime.admitted == [[3, 9], [3], [9], [14], [19], [24]]


def test_where_encoding_runs_beside_steps_it_starts_before_slots_are_free_and_is_admitted_when_ready():
    runtime, seen = FakeRuntime(slow=[0, 2]), []
    runtime.before_step = lambda: seen.append((runtime.encoded, len(runtime.admitted)))
    numbers = [4, 4, 0, 0, 1, 1]
    check(list(decode(IterableFeed(jobs_of(numbers)), runtime, settings(), Shapes(4, 2))), numbers)
    assert runtime.admitted == [[4, 4], [0, 0], [1, 1]]
    # two steps run while the second chunk is encoded; after its admission the third starts, with no slot free
    assert seen[:3] == [(2, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize("slow", [None, []])
def test_an_admitted_chunk_is_freed(slow):
    """On a GPU a chunk takes hundreds of megabytes."""
    runtime, chunks = FakeRuntime(slow=slow), []
    encode = runtime.encode

    def watched_encode(*given):
        assert all(earlier() is None for earlier in chunks)
        chunk = encode(*given)
        chunks.append(weakref.ref(chunk))
        return chunk

    runtime.encode = watched_encode
    numbers = [4, 4, 0, 0, 1, 1]
    check(list(decode(IterableFeed(jobs_of(numbers)), runtime, settings(), Shapes(4, 2))), numbers)
    assert len(chunks) == 3


def test_a_chunk_waits_until_slots_are_free_for_all_of_it():
    runtime = FakeRuntime()
    numbers = [0, 1, 2, 3, 4, 4, 4, 4]  # the first four end one after another
    check(list(decode(IterableFeed(jobs_of(numbers)), runtime, settings(), Shapes(6, 2))), numbers)
    assert runtime.admitted == [[0, 1], [2, 3], [4, 4], [4, 4]]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    return clock


def test_a_partial_chunk_is_admitted_50_ms_after_its_last_image(clock):
    runtime, feed = FakeRuntime(), Trickle(jobs_of([4, 9, 14]), [1, 0, 1, 0, 0, 0])
    admitted = []

    def wait(seconds):
        if runtime.admitted and not admitted:
            admitted.append(clock.now)
        clock.now += (seconds or 0.0) * 1.001  # a little late, as real clocks are

    feed.on_take = wait
    check(list(decode(feed, runtime, settings(), Shapes(4, 4))), [4, 9, 14])
    assert runtime.admitted == [[4, 9], [14]]
    assert admitted == [pytest.approx(Clock.now + 0.1, abs=1e-3)]
    assert feed.waits[:5] == [
        None,
        0,
        0.05,
        0,
        0.05,
    ]  # image 4 arrives, then 9 in time; after another 50 ms they are encoded


def test_a_partial_chunk_is_admitted_between_steps_after_50_ms(clock):
    runtime, feed = FakeRuntime(), Trickle(jobs_of([0, 4, 4, 4, 9, 9, 9]), [4, 1, *[0] * 20])
    runtime.before_step = lambda: setattr(clock, "now", clock.now + 0.02)
    seen = []
    for d in decode(feed, runtime, settings(most=30), Shapes(8, 4)):
        seen.append(d)
        if len(seen) == 2:
            assert runtime.admitted == [[0, 4, 4, 4], [9]]
    assert runtime.steps > 5
    check(seen, [0, 4, 4, 4, 9, 9, 9])


@pytest.mark.parametrize(("waited_for", "steps"), [(32, [0, 5, 5, 5]), (2, [0, 2, 2, 2])])
def test_the_first_captions_come_before_the_batch_is_filled(monkeypatch, waited_for, steps):
    monkeypatch.setattr(loop, "OPENING_STEPS", waited_for)
    runtime, encoded_after = FakeRuntime(), []
    encode = runtime.encode

    def watched_encode(*given):
        encoded_after.append(runtime.steps)
        return encode(*given)

    runtime.encode = watched_encode
    check(list(decode(IterableFeed(jobs_of([4] * 8)), runtime, settings(), Shapes(8, 2))), [4] * 8)
    assert encoded_after == steps


def test_one_loop_opens_a_run_and_the_activity_counts_all_loops():
    activity = Activity()
    first, second = activity.loop(9), activity.loop(9)
    assert (activity.stage, activity.seconds_left) == ("reading", None)
    assert [first.encodes(4), second.encodes(3)] == [True, False]
    assert (activity.stage, activity.under_way) == ("encoding", 7)
    first.admitted(4)
    first.stepped(0.5)
    assert activity.stage == "captioning"
    assert activity.seconds_left == 4.0  # eight more tokens
    second.admitted(3)
    first.finished(2, tokens=3)
    assert (activity.stage, activity.under_way) == ("decoding", 5)
    assert activity.seconds_left == 1.0


def test_after_the_last_image_nothing_is_under_way():
    activity = Activity()
    runtime = FakeRuntime(fails=lambda call: call == 5)  # the images in progress start again
    feed = IterableFeed(jobs_of([0, 1, 2, 3, 4]))
    list(loop.decode_steps(feed, runtime, settings(), Shapes(4, 2), activity=activity))
    assert (activity.encoding, activity.decoding) == (0, 0)


def test_without_images_the_loop_waits_instead_of_polling():
    runtime, feed = FakeRuntime(), Trickle(jobs_of([4, 9]), [1, *[0] * 100])
    check(list(decode(feed, runtime, settings(), Shapes(2, 1))), [4, 9])
    assert [w for w in feed.waits if w != 0] == [None, None, None]  # an image, another, the end
    assert len(feed.waits) <= 3 + 2 * runtime.steps


def test_an_empty_feed_ends_at_once():
    runtime = FakeRuntime()
    assert list(decode(IterableFeed([]), runtime, settings(), Shapes(4, 2))) == []
    assert runtime.steps == 0


def test_the_caller_is_not_in_inference_mode():
    for _ in decode(IterableFeed(jobs_of([1, 2, 3])), FakeRuntime(), settings(), Shapes(2, 1)):
        assert not torch.is_inference_mode_enabled()
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad


# Equal to the bit in the same shapes, whatever is in the other slots.

SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
}
IMAGES = pictures(9, seed=3)
KEYS = [noise.key(1, f"{i}.png") for i in range(len(IMAGES))]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decoder", ["gpt2", "bert"])
def test_a_caption_does_not_depend_on_the_other_images_to_the_bit(decoder, dtype, search):
    model = random_captioner("vit", decoder, dtype=dtype, seed=5)
    settings = Case({"max_new_tokens": 9, **SEARCHES[search]}, prompt=(4, 5)).settings(model)
    shapes = Shapes(5, 2)
    alone = [captions(model, [x], settings, shapes, [k])[0] for x, k in zip(IMAGES, KEYS, strict=True)]
    assert len({h.tokens for found in alone for h in found}) >= 3

    @hypothesis(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=14), portions_of, st.integers(0, 3))
    def same(order, portions, lag):
        jobs = [Job((n, i), IMAGES[i], KEYS[i]) for n, i in enumerate(order)]
        for done in decode(Trickle(jobs, portions), eager(model, lag), settings, shapes):
            assert done.hypotheses == alone[done.tag[1]]

    same()


@pytest.mark.parametrize("lag", range(4))
@pytest.mark.parametrize("part", ["memory", "a late layer's memory", "pool"])
def test_an_image_that_is_not_finite_does_not_change_others(part, lag):
    model = random_captioner("vit", "gpt2", seed=5)
    settings = Case({"max_new_tokens": 9, "num_beams": 2, "min_new_tokens": 3}, prompt=(4, 5)).settings(model)
    shapes = Shapes(3, 1)
    alone = [captions(model, [x], settings, shapes)[0] for x in IMAGES]
    runtime, black = eager(model, lag), np.zeros_like(IMAGES[0])
    encode, admit, step, poisoned = runtime.encode, runtime.admit, runtime.step, set()
    pixels_of = {}

    def poison(slot):
        state = runtime._pool[2:3] if part == "pool" else runtime._memory[0 if part == "memory" else 2 :]  # noqa: SLF001
        for tensor in state:
            tensor[slot] = torch.nan

    def recording_encode(pixels, encoder_ids):
        encoded = encode(pixels, encoder_ids)
        pixels_of[id(encoded)] = pixels
        return encoded

    def poisoning_admit(encoded, slots):
        finite = admit(encoded, slots)
        for i, slot in enumerate(slots):
            poisoned.discard(slot)
            if (pixels_of[id(encoded)][i] == 0).all():
                poisoned.add(slot)
                poison(slot)
                finite[i] = part != "memory"
        return finite

    def poisoning_step(tokens, position, visible):
        for slot in poisoned:
            if position[slot] == 2:
                poison(slot)
        return step(tokens, position, visible)

    runtime.encode, runtime.admit, runtime.step = recording_encode, poisoning_admit, poisoning_step
    jobs = [Job(i, x) for i, x in enumerate(IMAGES)] + [Job(-1, black)] * 4
    order = [jobs[i] for i in (9, 0, 1, 2, 10, 11, 3, 4, 5, 12, 6, 7, 8)]
    for portions in ([], [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, *[0] * 9, *[1, 0] * 20]):
        for done in decode(Trickle(order, portions), runtime, settings, shapes):
            assert done.hypotheses == ([] if done.tag == -1 else alone[done.tag])
