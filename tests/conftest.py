"""Settings and fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tensors of tests are tiny: with them, several threads are slower than one


@pytest.fixture(scope="session")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random captioner, which tests must not change."""
    from running import save_captioner

    return save_captioner(tmp_path_factory.mktemp("captioner"))
