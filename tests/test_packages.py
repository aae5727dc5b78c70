"""Packages that are missing, or installed and broken: what is done without them, and which error names them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from running import Ended, execute, paint, shell

from capcli.doctor.probe import import_errors
from capcli.imports import SEE_DOCTOR

DISTRIBUTION = "Metadata-Version: 2.1\nName: {}\nVersion: 99.0\n"
# Errors as of packages that were built for another release of what they use.
ERRORS = {
    "torchvision": "RuntimeError('operator torchvision::nms does not exist')",
    "onnxruntime": "ImportError('libcudart.so.13: cannot open shared object file')",
    "pillow_heif": "OSError('libheif.so.1: undefined symbol')",
    "matplotlib": "AttributeError('_ARRAY_API not found')",
    "tensorboard": "TypeError('Descriptors cannot be created directly')",
    "accelerate": "ImportError('cannot import name split_torch_state_dict_into_shards')",
    "datasets": "ValueError('pyarrow.lib.IpcWriteOptions size changed')",
    "pyarrow": "ImportError('numpy.core.multiarray failed to import')",
    "triton": "RuntimeError('no active driver')",
    "tensorrt": "FileNotFoundError('libnvinfer.so.11')",
    "scipy": "ImportError('GLIBCXX_3.4.32 not found')",
}
pytestmark = pytest.mark.slow
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {0!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Block())
"""


def path_with(folder: Path, *packages: str) -> dict[str, str]:
    """An environment in which these packages are installed and cannot be imported."""
    for name in packages:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise {ERRORS[name]}\n")
        metadata = folder / f"{name}-99.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(DISTRIBUTION.format(name.replace("_", "-")))
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def reason(package: str) -> str:
    kind, _, text = ERRORS[package].partition("(")
    return f"{kind}: {text.strip(')').strip(chr(39))}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    paint(folder, "a.png", "b.png", "c.png", "d.png")
    rows = "".join(f"{name}.png,a picture\n" for name in "abcd")
    (folder / "captions.csv").write_text("file_name,caption\n" + rows)
    return folder


def trained(folder: Path, pictures: Path, captioner: Path, **env: str) -> Ended:
    return execute(
        "train",
        *("--model", captioner, "--data", pictures / "captions.csv", "--val-fraction", "0.25"),
        *("--max-steps", "1", "--batch-size", "2", "--workers", "0", "--out", folder),
        env=env,
    )


def test_captioning_needs_none_of_the_optional_packages(pictures: Path, captioner: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(pictures, tmp_path / "photos", ignore=shutil.ignore_patterns("*.csv"))
    healthy = execute("caption", photos, "--model", captioner)
    (photos / "e.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    broken = execute("caption", photos, "--model", captioner, env=path_with(tmp_path / "packages", *ERRORS))
    assert broken.code == 3
    assert broken.out == healthy.out
    assert "unexpected" not in broken.err
    for used in ("torchvision", "accelerate", "triton", "scipy"):  # by transformers, where they are installed
        assert f"doing without {used}, which cannot be imported ({reason(used)}): see `capcli doctor`" in broken.err
    heic = "pillow-heif is installed but cannot be loaded (OSError: libheif.so.1: undefined symbol): pip install"
    assert heic in broken.err
    for unused in ("matplotlib", "tensorboard", "datasets", "pyarrow", "onnxruntime", "tensorrt"):
        assert unused not in broken.err


def test_training_goes_on_without_what_it_does_not_need(pictures: Path, captioner: Path, tmp_path: Path) -> None:
    env = path_with(tmp_path / "packages", "torchvision", "matplotlib", "tensorboard", "datasets")
    done = trained(tmp_path / "run", pictures, captioner, **env)
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert (
        f"no events for TensorBoard: the package tensorboard is installed but cannot be imported ({reason('tensorboard')})"
        in done.err
    )
    assert (
        f"curves.png is not drawn: the package matplotlib is installed but cannot be imported ({reason('matplotlib')})"
        in done.err
    )


@pytest.mark.parametrize("package", ["accelerate", "datasets", "pyarrow", "onnxruntime"])
def test_a_package_that_a_command_needs_is_named_with_its_error(
    package: str, pictures: Path, captioner: Path, tmp_path: Path
) -> None:
    env = path_with(tmp_path / "packages", package)
    out = tmp_path / "out"
    if package == "accelerate":
        done = trained(out, pictures, captioner, **env)
    elif package == "onnxruntime":
        done = execute("export", "--onnx", "--model", captioner, "--out", out, env=env)
    else:
        done = execute("prepare", "--data", pictures / "captions.csv", "--out", out, env=env)
    assert done.code == 1
    assert reason(package) in done.err
    assert "installed but cannot be" in done.err
    assert "--force-reinstall" in done.err
    assert "unexpected" not in done.err
    # export says "exporting ..." and more before, and peft cannot be imported without accelerate
    assert done.err.count("\n") == (2 if package == "accelerate" else 1) or package == "onnxruntime"


@pytest.mark.parametrize(
    "package", ["click", "numpy", "PIL", "torch", "transformers", "huggingface_hub", "safetensors"]
)
def test_a_missing_core_package_is_named(package: str, pictures: Path, captioner: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(package))
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = execute("caption", pictures / "a.png", "--model", captioner, env=env)
    assert done.code == 1
    name = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}.get(package, package)
    line = f"capcli: the package {package} is missing, which capcli needs: pip install {name}; {SEE_DOCTOR}"
    assert done.err.splitlines()[-1] == line  # torch warns of a missing NumPy before


def test_doctor_says_broken_and_why(tmp_path: Path) -> None:
    env = path_with(tmp_path, "torchvision", "datasets", "pillow_heif", "scipy")
    lines = execute("doctor", env=env).out.decode().splitlines()
    states = {line.split()[1]: line for line in lines if line.startswith("  ") and len(line.split()) > 1}
    for name, package in (
        ("gpu-decode", "torchvision"),
        ("train", "datasets"),
        ("heif", "pillow_heif"),
        ("scipy", "scipy"),
    ):
        assert states[name].split()[0] == "broken"
        assert reason(package) in states[name]
    fixes = [line.strip() for line in lines if line.strip().startswith("fix:")]
    assert "fix: pip install --force-reinstall datasets" in fixes
    assert "PyTorch" in states
    assert states["PyTorch"].split()[0] == "ok"


def test_a_package_that_crashes_on_import_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "crashing.py").write_text("import os; os.kill(os.getpid(), 11)")
    (tmp_path / "failing.py").write_text("raise RuntimeError('no')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        errors = import_errors({"a": "failing", "b": "crashing", "c": "failing", "d": "json"})
    assert errors["a"] == errors["c"] == "RuntimeError: no"
    assert "signal 11" in errors["b"]
    assert "d" not in errors


def test_too_few_open_files_are_one_sentence(pictures: Path, captioner: Path) -> None:
    done = shell('ulimit -n 8; capcli caption "$PHOTOS" --model "$MODEL"', PHOTOS=pictures, MODEL=captioner)
    assert done.code == 1
    assert "ulimit -n 1024" in done.err
    assert done.err.count("\n") == 1
