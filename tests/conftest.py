"""Settings of every test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tensors in tests are tiny: a second thread costs more than it brings


@pytest.fixture(scope="session")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random captioner on disk: treat it as constant."""
    from running import save_captioner

    return save_captioner(tmp_path_factory.mktemp("captioner"))
