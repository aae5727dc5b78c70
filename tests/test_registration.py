"""capcli's own architectures are transformers' too, after `capcli.register()`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from families import save_family
from running import PATIENCE, environment

ORDERS = {
    "capcli first": "import capcli; capcli.register(); from transformers import AutoModel",
    "transformers first": "import transformers, capcli; capcli.register(); from transformers import AutoModel",
    "Auto classes first": "from transformers import AutoModel; import capcli; capcli.register()",
    "twice": "import capcli; capcli.register(); capcli.register(); from transformers import AutoModel",
    "the family itself": "import capcli.models.prefix; from transformers import AutoModel",
}


def ran(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("prefix"), "prefix")


@pytest.mark.parametrize("order", ORDERS)
def test_a_folder_loads_as_any_model(folder: Path, order: str) -> None:
    script = f"{ORDERS[order]}; import sys; print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)"
    assert ran(script, folder) == "PrefixCaptioner"


def test_a_config_loads_alone(folder: Path) -> None:
    script = "import sys, capcli; capcli.register(); from transformers import AutoConfig as A; "
    script += "print(A.from_pretrained(sys.argv[1]).image_tokens)"
    assert ran(script, folder) == "10"


def test_importing_capcli_imports_neither_torch_nor_transformers() -> None:
    assert ran("import sys, capcli; print({'torch', 'transformers'} & set(sys.modules))") == "set()"
