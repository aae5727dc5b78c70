"""The wheel and the sdist: built, installed without the checkout, and used."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from running import PATIENCE, environment

ROOT = Path(__file__).parents[1]


def ran(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment(PYTHONPATH=""), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it, as an index would serve them."""
    folder = tmp_path_factory.mktemp("dist")
    ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and with this one's dependencies but not its editable capcli."""
    environment_folder = tmp_path_factory.mktemp("installed") / "venv"
    ran(sys.executable, "-m", "venv", "--without-pip", environment_folder)
    (wheel,) = built.glob("*.whl")
    python = environment_folder / "bin" / "python"
    ran(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    site = next(environment_folder.glob("lib/python*/site-packages"))
    # A path added by a .pth file has its own .pth files ignored, so the checkout is not found through it.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment_folder


def test_the_wheel_holds_the_package_and_the_sdist_everything_to_build_it(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert packaged == {
        str(path.relative_to(ROOT)) for path in (ROOT / "capcli").rglob("*") if path.suffix in (".py", ".typed")
    }
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= packaged | {"pyproject.toml", "README.md", "LICENSE"}


def test_the_installed_command_captions(installed: Path, tmp_path: Path) -> None:
    where = ran(installed / "bin" / "python", "-c", "import capcli; print(capcli.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(installed)
    assert "caption" in ran(installed / "bin" / "capcli", "--help", cwd=tmp_path).stdout
    examples, out = ROOT / "examples", tmp_path / "captions.jsonl"
    ran(
        *(installed / "bin" / "capcli", "caption", examples / "scenes", "--model", examples / "demo-model"),
        *("--limit", 4, "--out", out),
        cwd=tmp_path,
    )
    assert [row.keys() for row in map(json.loads, out.read_text().splitlines())] == [{"file_name", "text", "score"}] * 4
