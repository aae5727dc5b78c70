"""Attention as capcli has it, beside the plain formula: for any number of queries, on CPUs with AMX and without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from capcli.models import attention

HEADS, KEYS, SIZE = 3, 29, 8


def attended(query, key, value, mask):
    """[S, H, Q, D] on [S, H, N, D] in float64 -> [S, Q, H, D]."""
    query, key, value = (x.double() for x in (query, key, value))
    scores = query @ key.mT * SIZE**-0.5
    return ((scores if mask is None else scores + mask.double()).softmax(-1) @ value).transpose(1, 2)


def draw(images, rows, dtype):
    """Queries, keys and values as linear layers leave them: heads lie between each other."""
    made = [torch.randn(images, n, HEADS, SIZE, dtype=dtype).transpose(1, 2) for n in (rows, KEYS, KEYS)]
    mask = torch.where(torch.rand(images, 1, rows, KEYS) < 0.3, -1e4, 0.0).to(dtype)
    return made, mask


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_formula(monkeypatch, amx, rows, dtype):
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    torch.manual_seed(0)
    for images in (1, 2, 3, 4):
        made, mask = draw(images, rows, dtype)
        for each in (None, mask):
            said, _ = attention.attend(nn.Module(), *made, each)
            assert said.shape == (images, rows, HEADS, SIZE)
            near = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(said.double(), attended(*made, each), atol=near, rtol=near)
        seen = mask == 0
        said, _ = attention.attend(nn.Module(), *made, seen)
        hidden = attended(*made, torch.where(seen, 0.0, -torch.inf))
        torch.testing.assert_close(said.double(), hidden, atol=near, rtol=near)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("images", [2, 3, 5, 8])
def test_an_image_is_the_same_to_the_bit_wherever_it_stands(monkeypatch, amx, rows, images):
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        made, _ = draw(images, rows, dtype)
        said, _ = attention.attend(nn.Module(), *made, None)
        turned, _ = attention.attend(nn.Module(), *(x.flip(0) for x in made), None)
        assert torch.equal(said, turned.flip(0))


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_queries_are_answered_in_their_dtype_whatever_is_kept(monkeypatch, amx, rows):
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    torch.manual_seed(0)
    (query, key, value), mask = draw(2, rows, torch.float32)
    for each in (None, mask, mask == 0):
        hidden = each if each is None or each.is_floating_point() else torch.where(each, 0.0, -torch.inf)
        for said, _ in (
            attention.attend(nn.Module(), query, key.bfloat16(), value.bfloat16(), each),
            attention.attend_in_bfloat16(nn.Module(), query, key, value, each),
        ):
            assert said.dtype == torch.float32
            torch.testing.assert_close(said.double(), attended(query, key, value, hidden), atol=2e-2, rtol=2e-2)
