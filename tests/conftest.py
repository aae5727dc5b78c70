"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tensors of tests are tiny: with them, several threads are slower than one


@pytest.fixture(scope="session")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random captioner, which tests must not change."""
    from running import save_captioner

    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="session", autouse=True)
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder for results that tests in several processes share (exporting.py)."""
    folder = tmp_path_factory.getbasetemp()
    os.environ["CAPCLI_TEST_SHARED"] = str(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.fixture
def shared_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`capcli export` in this process takes graphs that another test has exported from an equal module."""
    import exporting

    from capcli.export import graphs

    monkeypatch.setattr(graphs, "encode_graph", exporting.encode_graph_once)
    monkeypatch.setattr(graphs, "step_graph", exporting.step_graph_once)
