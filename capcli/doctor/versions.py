"""Which packages are installed: those capcli is made of, and those of its extras."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from capcli import __version__
from capcli.doctor.findings import Line

NEEDED = ("torch", "transformers", "pillow", "numpy", "huggingface_hub", "safetensors", "click", "rich")
# Those of pyproject.toml; a test holds them alike.
EXTRAS = {
    "gpu-decode": ("torchvision",),
    "heif": ("pillow-heif",),
    "metrics": ("pycocoevalcap",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "train": (
        "accelerate",
        "datasets",
        "httpx2",
        "matplotlib",
        "pyarrow",
        "pycocoevalcap",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "tomli-w",
    ),
    "trt": ("onnx", "onnxruntime", "onnxscript", "tensorrt"),
}
FOR = {
    "gpu-decode": "capcli caption --gpu-decode, on CUDA",
    "heif": "HEIC and HEIF images",
    "metrics": "capcli evaluate",
    "onnx": "capcli export, and engines in ONNX Runtime",
    "train": "capcli prepare and capcli train",
}
RUNTIMES = ("onnxruntime", "tensorrt")
OTHER_BUILDS = {"onnxruntime": ("onnxruntime-gpu",), "tensorrt": ("tensorrt-cu13", "tensorrt-cu12")}
JAVA_PATIENCE = 30.0  # seconds


def installed(package: str) -> str | None:
    """The version of a package, or of another build of it."""
    for name in (package, *OTHER_BUILDS.get(package, ())):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def look_at_versions() -> Iterator[Line]:
    """One line with all versions, and one for each package that capcli cannot do without."""
    python = platform.python_version()
    found = {name: installed(name) for name in (*NEEDED, *RUNTIMES)}
    shown = [f"{name} {number}" for name, number in found.items() if number]
    facts = {"capcli": __version__, "python": python, **found, "platform": platform.platform()}
    yield Line("capcli", "ok", ", ".join([__version__, f"Python {python}", *shown]), facts={"versions": facts})
    for name in NEEDED:
        if found[name] is None:
            yield Line(name, "missing", "capcli needs it", fix=f"pip install {name}")


def look_at_extras() -> Iterator[Line]:
    for extra, use in FOR.items():
        lacks = [name for name in EXTRAS[extra] if installed(name) is None]
        fix = f"pip install 'capcli[{extra}]'" if lacks else None
        text = f"{use}: lacks {', '.join(lacks)}" if lacks else use
        yield Line(extra, "missing" if lacks else "ok", text, fix, {"lacks": lacks})
    yield look_at_java()


def look_at_java() -> Line:
    """Java, by starting it: some systems have a program of that name which only tells where to get one."""
    from capcli.errors import CapcliError
    from capcli.metrics.java import java

    use = "METEOR and the PTB tokenizer of capcli evaluate"
    install = {"Darwin": "brew install openjdk", "Windows": "winget install EclipseAdoptium.Temurin.21.JRE"}
    fix = install.get(platform.system(), "apt-get install default-jre-headless")
    try:
        done = subprocess.run(
            [java(), "-version"], capture_output=True, timeout=JAVA_PATIENCE, stdin=subprocess.DEVNULL
        )
    except CapcliError:
        return Line("Java", "missing", f"{use}; without it: --without-java", fix)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Line("Java", "broken", f"{use}; it does not start: {error}", fix)
    told = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no version told"]
    if done.returncode:
        return Line("Java", "broken", f"{use}; it does not start: {told[0]}", fix)
    return Line("Java", "ok", f"{use}: {told[0]}", facts={"version": told[0]})
