"""The decode loop: every image gets its own caption once, whatever comes when and whatever memory there is."""

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
from capcli.decoding.loop import IterableFeed, Job, decode
from capcli.decoding.shapes import Shapes
from capcli.errors import CapcliError


def jobs_of(numbers):
    return [Job((i, n), image(n)) for i, n in enumerate(numbers)]


def check(done, numbers, most=6):
    """Every image once, with its own caption; those that are not finite with none."""
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


@given(numbers_of, shapes_of, portions_of, slow_of, st.integers(0, 3), st.integers(1, 3), st.sampled_from([1, 3, 6]))
def test_every_image_gets_its_own_caption_once(numbers, shapes, portions, slow, lag, beams, most):
    runtime, feed = FakeRuntime(lag, slow=slow), Trickle(jobs_of(numbers), portions)
    yielded = 0

    def on_take(wait):
        assert wait == 0 or sum(map(len, runtime.admitted)) == yielded, "waits while images are seated"

    feed.on_take = on_take
    done = []
    for d in decode(feed, runtime, settings(most, beams), shapes):
        assert feed.taken - yielded <= shapes.slots + shapes.chunk, "runs ahead"
        yielded += 1
        done.append(d)
    check(done, numbers, most)


@given(
    st.lists(st.integers(0, 40), max_size=25),
    shapes_of,
    portions_of,
    slow_of,
    st.integers(0, 3),
    st.sets(st.integers(1, 30), max_size=3),
)
def test_out_of_memory_costs_slots_and_no_caption(numbers, shapes, portions, slow, lag, failing):
    runtime, told, done = FakeRuntime(lag, failing.__contains__, slow), [], []
    try:
        done.extend(decode(Trickle(jobs_of(numbers), portions), runtime, settings(), shapes, told.append))
    except CapcliError:
        assert runtime.shapes.slots == 1
    else:
        check(done, numbers)
    expected, slots = [], shapes.slots
    while slots > 1 and len(expected) < len(told):
        slots //= 2
        expected.append(slots)
    assert [s.slots for s in told] == expected
    assert all(s.chunk <= s.slots for s in told)
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
def test_every_way_to_run_out_of_memory_is_known(error):
    assert loop.out_of_memory(error)


def test_other_errors_are_no_lack_of_memory():
    runtime = FakeRuntime()

    def breaks():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    runtime.before_step = breaks
    told = []
    with pytest.raises(RuntimeError, match="mat1"):
        list(decode(IterableFeed(jobs_of([1])), runtime, settings(), Shapes(2, 2), told.append))
    assert told == []


def test_one_image_that_does_not_fit_is_an_error_that_says_so():
    with pytest.raises(CapcliError, match="not even one image"):
        list(decode(IterableFeed(jobs_of([1, 2])), FakeRuntime(fails=lambda _: True), settings(), Shapes(5, 2)))


def test_images_in_flight_start_again_in_their_order():
    runtime = FakeRuntime(fails={4}.__contains__)  # allocate, encode, admit, and the first step, while two more wait
    done = list(decode(IterableFeed(jobs_of([3, 9, 14, 19, 24])), runtime, settings(), Shapes(3, 2)))
    check(done, [3, 9, 14, 19, 24])
    assert runtime.admitted == [[3, 9], [3], [9], [14], [19], [24]]


def test_a_chunk_encoded_ahead_starts_again_in_its_place():
    runtime = FakeRuntime(fails={5}.__contains__, slow=[])  # the second encoding, begun before the first step
    done = list(decode(IterableFeed(jobs_of([3, 9, 14, 19, 24])), runtime, settings(), Shapes(3, 2)))
    check(done, [3, 9, 14, 19, 24])
    assert runtime.admitted == [[3, 9], [3], [9], [14], [19], [24]]


def test_beside_steps_a_chunk_is_encoded_before_there_are_seats_and_seated_when_it_is_ready():
    runtime, seen = FakeRuntime(slow=[0, 2]), []
    runtime.before_step = lambda: seen.append((runtime.encoded, len(runtime.admitted)))
    numbers = [4, 4, 0, 0, 1, 1]
    check(list(decode(IterableFeed(jobs_of(numbers)), runtime, settings(), Shapes(4, 2))), numbers)
    assert runtime.admitted == [[4, 4], [0, 0], [1, 1]]
    # two steps go by while the second is under way; once it sits, the third is begun, with no seat free
    assert seen[:3] == [(2, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize("slow", [None, []])
def test_what_is_seated_is_not_kept_beside_its_seats(slow):
    """On a device a chunk is hundreds of megabytes."""
    runtime, chunks = FakeRuntime(slow=slow), []
    encode = runtime.encode

    def encode_watched(*given):
        assert all(chunk() is None for chunk in chunks)
        made = encode(*given)
        chunks.append(weakref.ref(made))
        return made

    runtime.encode = encode_watched
    numbers = [4, 4, 0, 0, 1, 1]
    check(list(decode(IterableFeed(jobs_of(numbers)), runtime, settings(), Shapes(4, 2))), numbers)
    assert len(chunks) == 3


def test_a_chunk_waits_for_seats_for_all_of_it():
    runtime = FakeRuntime()
    numbers = [0, 1, 2, 3, 4, 4, 4, 4]  # the first four leave one after another
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
        clock.now += (seconds or 0.0) * 1.001  # a little late, as clocks are

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
    ]  # 4 comes, then 9 within the time, and after as long again they go


def test_a_partial_chunk_is_admitted_beside_others_after_50_ms(clock):
    runtime, feed = FakeRuntime(), Trickle(jobs_of([4, 4, 4, 4, 9, 9, 9]), [4, 1, *[0] * 20])
    runtime.before_step = lambda: setattr(clock, "now", clock.now + 0.02)
    seen = []
    for d in decode(feed, runtime, settings(most=30), Shapes(8, 4)):
        seen.append(d)
        if len(seen) == 1:
            assert runtime.admitted == [[4, 4, 4, 4], [9]]
    assert runtime.steps > 5
    check(seen, [4, 4, 4, 4, 9, 9, 9])


def test_while_nothing_is_there_the_loop_waits_instead_of_asking_again():
    runtime, feed = FakeRuntime(), Trickle(jobs_of([4, 9]), [1, *[0] * 100])
    check(list(decode(feed, runtime, settings(), Shapes(2, 1))), [4, 9])
    assert [w for w in feed.waits if w != 0] == [None, None, None]  # an image, another, the end
    assert len(feed.waits) <= 3 + 2 * runtime.steps


def test_nothing_to_caption_ends_at_once():
    runtime = FakeRuntime()
    assert list(decode(IterableFeed([]), runtime, settings(), Shapes(4, 2))) == []
    assert runtime.steps == 0


def test_who_takes_the_captions_is_not_in_inference_mode():
    for _ in decode(IterableFeed(jobs_of([1, 2, 3])), FakeRuntime(), settings(), Shapes(2, 1)):
        assert not torch.is_inference_mode_enabled()
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad


# Bit for bit: the same shapes, whatever else runs beside.

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
def test_a_caption_is_the_same_to_the_bit_whatever_runs_beside_it(decoder, dtype, search):
    model = random_captioner("vit", decoder, dtype=dtype, seed=5)
    asked = Case({"max_new_tokens": 9, **SEARCHES[search]}, prompt=(4, 5)).settings(model)
    shapes = Shapes(5, 2)
    alone = [captions(model, [x], asked, shapes, [k])[0] for x, k in zip(IMAGES, KEYS, strict=True)]
    assert len({h.tokens for found in alone for h in found}) >= 3

    @hypothesis(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=14), portions_of, st.integers(0, 3))
    def same(order, portions, lag):
        jobs = [Job((n, i), IMAGES[i], KEYS[i]) for n, i in enumerate(order)]
        for done in decode(Trickle(jobs, portions), eager(model, lag), asked, shapes):
            assert done.hypotheses == alone[done.tag[1]]

    same()


@pytest.mark.parametrize("lag", range(4))
@pytest.mark.parametrize("part", ["memory", "a late layer's memory", "pool"])
def test_an_image_that_is_not_finite_leaves_its_neighbours_and_successors_alone(part, lag):
    model = random_captioner("vit", "gpt2", seed=5)
    asked = Case({"max_new_tokens": 9, "num_beams": 2, "min_new_tokens": 3}, prompt=(4, 5)).settings(model)
    shapes = Shapes(3, 1)
    alone = [captions(model, [x], asked, shapes)[0] for x in IMAGES]
    runtime, black = eager(model, lag), np.zeros_like(IMAGES[0])
    encode, admit, step, poisoned = runtime.encode, runtime.admit, runtime.step, set()
    pictured = {}

    def poison(seat):
        state = runtime._pool[2:3] if part == "pool" else runtime._memory[0 if part == "memory" else 2 :]  # noqa: SLF001
        for tensor in state:
            tensor[seat] = torch.nan

    def encode_known(pixels, encoder_ids):
        encoded = encode(pixels, encoder_ids)
        pictured[id(encoded)] = pixels
        return encoded

    def admit_poisoned(encoded, seats):
        finite = admit(encoded, seats)
        for i, seat in enumerate(seats):
            poisoned.discard(seat)
            if (pictured[id(encoded)][i] == 0).all():
                poisoned.add(seat)
                poison(seat)
                finite[i] = part != "memory"
        return finite

    def step_poisoned(tokens, position, visible):
        for seat in poisoned:
            if position[seat] == 2:
                poison(seat)
        return step(tokens, position, visible)

    runtime.encode, runtime.admit, runtime.step = encode_known, admit_poisoned, step_poisoned
    jobs = [Job(i, x) for i, x in enumerate(IMAGES)] + [Job(-1, black)] * 4
    order = [jobs[i] for i in (9, 0, 1, 2, 10, 11, 3, 4, 5, 12, 6, 7, 8)]
    for portions in ([], [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, *[0] * 9, *[1, 0] * 20]):
        for done in decode(Trickle(order, portions), runtime, asked, shapes):
            assert done.hypotheses == ([] if done.tag == -1 else alone[done.tag])
