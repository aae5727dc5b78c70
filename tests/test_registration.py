"""`capcli.register()` registers capcli's own architectures with transformers' Auto classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from families import save_family
from running import PATIENCE, environment

ORDERS = {
    "before transformers is imported, twice": "import capcli; capcli.register(); capcli.register(); "
    "from transformers import AutoConfig, AutoModel",
    "after the Auto classes are imported": "from transformers import AutoConfig, AutoModel; "
    "import capcli; capcli.register()",
}
LOAD = """
import sys
print(type(AutoModel.from_pretrained(sys.argv[1])).__name__, AutoConfig.from_pretrained(sys.argv[1]).image_tokens)
"""


def output_of(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("prefix"), "prefix")


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_load_a_captioner_with_a_prefix(folder: Path, order: str) -> None:
    assert output_of(f"{ORDERS[order]}\n{LOAD}", folder) == "PrefixCaptioner 10"


def test_importing_capcli_imports_neither_torch_nor_transformers() -> None:
    assert output_of("import sys, capcli; print({'torch', 'transformers'} & set(sys.modules))") == "set()"
