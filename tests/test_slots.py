"""Slots: which item is in which slot, and when a finished flag counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from capcli.decoding.slots import Slots


def test_the_lowest_free_slots_are_taken_first():
    slots: Slots[str] = Slots(4)
    assert slots.admit(["a", "b", "c"]) == [0, 1, 2]
    assert slots.release(1) == "b"
    assert slots.release(0) == "a"
    assert slots.admit(["d", "e", "f"]) == [0, 1, 3]
    assert (slots.free, slots.busy) == (0, True)


def test_too_many_items_raise_an_error():
    slots: Slots[str] = Slots(1)
    slots.admit(["a"])
    with pytest.raises(IndexError):
        slots.admit(["b"])


def test_a_free_slot_cannot_be_released():
    with pytest.raises(KeyError):
        Slots(2).release(0)


def test_a_reading_does_not_concern_items_admitted_after_it():
    slots: Slots[str] = Slots(2)
    slots.admit(["a", "b"])
    slots.now = 3
    slots.release(0)
    slots.admit(["c"])
    assert slots.finished([True, True], step=3) == [1]  # slot 0's flag is that of its previous item
    assert sorted(slots.finished([True, True], step=4)) == [0, 1]
    assert slots.finished([False, False], step=4) == []


def test_items_are_in_the_order_of_admission():
    slots: Slots[str] = Slots(3)
    slots.admit(["a", "b", "c"])
    slots.release(0)
    slots.admit(["d"])
    assert slots.items == ["b", "c", "d"]


@hypothesis(deadline=None)
@given(st.lists(st.integers(-3, 4)), st.integers(1, 9))
def test_after_any_admissions_and_releases_each_item_has_its_own_slot(moves, count):
    slots: Slots[int] = Slots(count)
    occupied: dict[int, int] = {}
    count_admitted = 0
    for move in moves:
        if move > 0:
            items = list(range(count_admitted, count_admitted + min(move, slots.free)))
            count_admitted += len(items)
            taken = slots.admit(items)
            assert not set(taken) & set(occupied)
            occupied |= dict(zip(taken, items, strict=True))
        for _ in range(min(-move, len(occupied))):
            slot, item = occupied.popitem()
            assert slots.release(slot) == item
        assert set(occupied) <= set(range(count))
        assert slots.free == count - len(occupied)
        assert slots.busy == bool(occupied)
        assert slots.items == sorted(occupied.values())
