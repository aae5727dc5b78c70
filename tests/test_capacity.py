"""The automatic batch size: no more slots than are useful, fit into memory, and have images."""

from __future__ import annotations

import io
from collections.abc import Callable
from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from capcli import Captioner
from capcli.decoding import shapes as shapes_module
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import (
    CPU_ROWS,
    CPU_SLOTS,
    CUDA_ROWS,
    CUDA_SLOTS,
    Shapes,
    fitting_slots,
    free_memory,
    useful_slots,
)
from capcli.options import GenerationOptions

CPU = torch.device("cpu")
BOUNDS = {"cpu": (CPU_SLOTS, CPU_ROWS), "cuda": (CUDA_SLOTS, CUDA_ROWS)}
Free = Callable[[int], None]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    """Sets the number of free bytes of the device."""
    return lambda count: monkeypatch.setattr(shapes_module, "free_memory", lambda _: count)


@pytest.fixture(scope="module")
def model(captioner: Path) -> Captioner:
    return Captioner.load(str(captioner), device="cpu", dtype="float32").core


@pytest.mark.parametrize("place", BOUNDS)
def test_more_rows_per_image_make_fewer_slots_useful(place: str) -> None:
    most, most_rows = BOUNDS[place]
    found = [useful_slots(torch.device(place), Settings((0,), (1,), 5, num_beams=rows)) for rows in range(1, 201)]
    assert found[0] == most
    assert found == sorted(found, reverse=True)
    assert len(set(found)) > 5
    assert all(slots == 1 or 1 < slots * rows <= most_rows for rows, slots in enumerate(found, 1))


def test_samples_of_an_image_are_rows_as_beams_are() -> None:
    beams = Settings((0,), (1,), 5, num_beams=16)
    samples = Settings((0,), (1,), 5, do_sample=True, num_return_sequences=16)
    assert useful_slots(CPU, beams) == useful_slots(CPU, samples) == CPU_ROWS // 16


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 45))
def test_slots_fit_into_the_free_memory_and_are_at_least_one(memory: int, per_slot: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shapes_module, "free_memory", lambda _: memory)
        slots = fitting_slots(CPU, per_slot)
    assert slots == 1 or 1 < slots * per_slot <= memory or per_slot == 0
    assert slots >= 1


def test_half_of_the_free_memory_is_used(free: Free) -> None:
    found = []
    for memory in (0, 1, 1999, 2000, 4000, 200_000):
        free(memory)
        found.append(fitting_slots(CPU, 1000))
    assert found == [1, 1, 1, 1, 2, 100]


def test_the_free_memory_is_that_of_proc_meminfo(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(CPU) > 1 << 20
    meminfo = "MemTotal: 9 kB\nMemAvailable:    1234 kB\n"
    monkeypatch.setattr(shapes_module, "open", lambda *_: io.StringIO(meminfo), raising=False)
    assert free_memory(CPU) == 1234 * 1024


@pytest.mark.parametrize("text", ["MemTotal: 9 kB\n", "MemAvailable: many\n", "no colon\n", None])
def test_without_proc_meminfo_four_gibibytes_are_assumed(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def opened(*_: object) -> io.StringIO:
        if text is None:
            raise FileNotFoundError("/proc/meminfo")
        return io.StringIO(text)

    monkeypatch.setattr(shapes_module, "open", opened, raising=False)
    assert free_memory(CPU) == 4 << 30


def test_there_are_no_more_slots_than_images_and_at_least_one(model: Captioner, free: Free) -> None:
    free(1 << 40)
    settings = model.settings(GenerationOptions())
    slots = {count: model.shapes(settings, count).slots for count in (0, 1, 3, CPU_SLOTS, 10**6, None)}
    assert slots == {0: 1, 1: 1, 3: 3, CPU_SLOTS: CPU_SLOTS, 10**6: CPU_SLOTS, None: CPU_SLOTS}


@hypothesis(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 2000))
def test_shapes_for_a_known_number_of_images_cost_no_more(slots: int, count: int) -> None:
    """No more rounds of steps, no slots that are never used, and at most one more chunk to encode."""
    usual = Shapes.of(slots)
    shapes = usual.shared_by(count)
    assert 1 <= shapes.chunk <= shapes.slots <= slots
    assert ceil(count / shapes.chunk) * shapes.chunk <= ceil(count / usual.chunk) * usual.chunk + usual.chunk
    assert ceil(count / shapes.slots) <= ceil(count / slots)
    if count <= usual.chunk:
        assert shapes == Shapes(count, count)


@pytest.mark.parametrize("size", [1, 3, 500])
def test_a_given_batch_size_is_kept(model: Captioner, free: Free, size: int) -> None:
    free(0)
    settings = model.settings(GenerationOptions(num_beams=3))
    assert {model.shapes(settings, count, size).slots for count in (size, 10**6, None)} == {size}


def test_little_memory_makes_fewer_slots_and_beams_fewer_still(model: Captioner, free: Free) -> None:
    settings = [model.settings(GenerationOptions(num_beams=beams)) for beams in (1, 4)]
    free(1 << 40)
    largest = [model.shapes(each, None).slots for each in settings]
    assert largest == [CPU_SLOTS, min(CPU_SLOTS, CPU_ROWS // 4)]
    free(1 << 20)
    greedy, beams = (model.shapes(each, None).slots for each in settings)
    assert 1 < beams < greedy < CPU_SLOTS
    free(0)
    assert [model.shapes(each, None).slots for each in settings] == [1, 1]


@pytest.mark.parametrize("beams", [1, 2, 5, 50])
def test_a_chunk_is_never_larger_than_the_slots(model: Captioner, beams: int) -> None:
    settings = model.settings(GenerationOptions(num_beams=beams))
    for count in (*range(40), None):
        for size in (None, 1, 2, 3, 4, 5, 64):
            shapes = model.shapes(settings, count, size)
            assert 1 <= shapes.chunk <= shapes.slots


def test_a_runtime_is_given_what_fits_or_the_batch_size_of_the_user(
    model: Captioner, free: Free, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots, the most that fit and the number of images; for a batch size of the user, only slots."""
    free(0)
    runtime, calls = model.model.runtime, []
    shapes = runtime.shapes
    monkeypatch.setattr(
        runtime, "shapes", lambda slots, settings, *more: calls.append((slots, *more)) or shapes(slots, settings, *more)
    )
    settings = model.settings(GenerationOptions())
    for count, size in ((None, None), (3, None), (10**6, 500), (3, 500)):
        model.shapes(settings, count, size)
    assert calls == [(CPU_SLOTS, 1, None), (CPU_SLOTS, 1, 3), (500,), (500,), (3,)]
