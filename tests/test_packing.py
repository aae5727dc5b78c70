"""Packing changes only the given module; only the command sets malloc."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from captioners import pictures, random_captioner
from running import call, paint
from torch import nn

from capcli import Captioner
from capcli.models import packing
from capcli.models.packing import PackedLinear, keep_memory_mapped, speed_up


def test_other_models_keep_their_layers():
    given, other = (copy.deepcopy(random_captioner("vit", "gpt2")) for _ in range(2))
    forward = nn.Linear.forward
    speed_up(given)
    assert any(isinstance(layer, PackedLinear) for layer in given.modules()) == packing.can_pack(torch.float32)
    assert not any(isinstance(layer, PackedLinear) for layer in other.modules())
    assert nn.Linear.forward is forward


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The settings of malloc, which are not made here."""
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *given: calls.append(given))
    monkeypatch.setattr(packing, "ctypes", SimpleNamespace(CDLL=lambda _: library))
    return calls


def test_only_the_command_sets_malloc(captioner: Path, tmp_path: Path, settings: list[tuple[int, int]]):
    list(Captioner.load(str(captioner), device="cpu").caption(pictures(1)))
    assert settings == []
    done = call("caption", paint(tmp_path, "a.png"), "--model", captioner, "--device", "cpu", "-o", "-", "--workers", 0)
    assert done.code == 0
    assert len(settings) == 4


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_without_glibc_malloc_is_not_set(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def missing(_: None) -> None:
        raise error

    monkeypatch.setattr(packing, "ctypes", SimpleNamespace(CDLL=missing))
    keep_memory_mapped()
