"""Slots: who sits where, and when a report of an end is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capcli.decoding.slots import Slots


def test_the_lowest_free_seats_are_given_first():
    slots: Slots[str] = Slots(4)
    assert slots.admit(["a", "b", "c"]) == [0, 1, 2]
    assert slots.release(1) == "b"
    assert slots.release(0) == "a"
    assert slots.admit(["d", "e", "f"]) == [0, 1, 3]
    assert (slots.free, slots.busy) == (0, True)


def test_there_are_no_more_seats_than_slots():
    slots: Slots[str] = Slots(1)
    slots.admit(["a"])
    with pytest.raises(IndexError):
        slots.admit(["b"])


def test_nobody_leaves_an_empty_seat():
    with pytest.raises(KeyError):
        Slots(2).release(0)


def test_a_reading_says_nothing_of_who_came_after_it():
    slots: Slots[str] = Slots(2)
    slots.admit(["a", "b"])
    slots.now = 3
    slots.release(0)
    slots.admit(["c"])
    assert slots.finished([True, True], step=3) == [1]  # seat 0's flag is its last sitter's
    assert sorted(slots.finished([True, True], step=4)) == [0, 1]
    assert slots.finished([False, False], step=4) == []


def test_items_are_listed_in_the_order_of_arrival():
    slots: Slots[str] = Slots(3)
    slots.admit(["a", "b", "c"])
    slots.release(0)
    slots.admit(["d"])
    assert slots.items == ["b", "c", "d"]


@given(st.lists(st.integers(-3, 4)), st.integers(1, 9))
def test_whatever_comes_and_goes_each_item_has_a_seat_of_its_own(moves, count):
    slots: Slots[int] = Slots(count)
    seated: dict[int, int] = {}
    arrived = 0
    for move in moves:
        if move > 0:
            items = list(range(arrived, arrived + min(move, slots.free)))
            arrived += len(items)
            seats = slots.admit(items)
            assert not set(seats) & set(seated)
            seated |= dict(zip(seats, items, strict=True))
        for _ in range(min(-move, len(seated))):
            seat, item = seated.popitem()
            assert slots.release(seat) == item
        assert set(seated) <= set(range(count))
        assert slots.free == count - len(seated)
        assert slots.busy == bool(seated)
        assert slots.items == sorted(seated.values())
