"""Versions of packages, capcli's extras, and what each runtime can do: PyTorch, ONNX Runtime, TensorRT."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from capcli import __version__
from capcli.doctor.output import Line
from capcli.doctor.probe import Answer
from capcli.engine.packages import FUSED, KEEPS, ONNXRUNTIME, TENSORRT, release
from capcli.imports import UNUSED

NEEDED = ("torch", "transformers", "pillow", "numpy", "huggingface_hub", "safetensors", "click", "rich")
USES = {
    "gpu-decode": "capcli caption --gpu-decode, on CUDA",
    "endpoint": "capcli caption --endpoint, --schema",
    "vlm": "SmolVLM models",
    "heif": "HEIC and HEIF images",
    "metrics": "capcli evaluate",
    "onnx": "capcli export, and engines in ONNX Runtime",
    "train": "capcli prepare and capcli train",
}
# The modules that capcli's commands import from a package, where it is not the one of the package's name. transformers is the
# last, as it imports others.
MODULES = {
    "pillow": "PIL.Image",
    "rich": "rich.progress",
    "safetensors": "safetensors.torch",
    "accelerate": "accelerate.utils",
    "matplotlib": "matplotlib.figure",
    "pyarrow": "pyarrow.parquet",
    "pycocoevalcap": "pycocoevalcap.cider.cider",
    "sentencepiece": "sentencepiece.sentencepiece_model_pb2",
    "tensorboard": "torch.utils.tensorboard",
    "torchvision": "torchvision.io",
    "transformers": "transformers.modeling_utils",
}
ON_GPU = ("gpu-decode",)  # extras that need an NVIDIA GPU
OTHER_BUILDS = {"onnxruntime": ("onnxruntime-gpu",), "tensorrt": ("tensorrt-cu13", "tensorrt-cu12")}
JAVA_TIMEOUT = 30.0  # seconds

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
REINSTALL_TORCH = "pip install --force-reinstall torch"  # the default package for Linux is built for CUDA
REINSTALL_ONNXRUNTIME = "pip install --force-reinstall onnxruntime"
ONNXRUNTIME_GPU = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def installed(package: str) -> str | None:
    """The version of a package, or of another build of it; None if not installed."""
    for name in (package, *OTHER_BUILDS.get(package, ())):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def packages(extra: str) -> list[str]:
    """The packages of one of capcli's extras, from the metadata of its installation."""
    found = (re.match(r"""([\w.-]+).*;.*extra == ["']([\w-]+)["']""", text) for text in requires("capcli") or ())
    return [match[1] for match in found if match and match[2] == extra]


def modules() -> dict[str, str]:
    """The modules of all packages on this machine that commands import, by the name of the package."""
    names = [*UNUSED, *(name for extra in USES for name in packages(extra)), *NEEDED[::-1]]
    found = {name: MODULES.get(name, name.replace("-", "_")) for name in names if name != "torch"}  # torch is a runtime
    return {name: module for name, module in found.items() if installed(name) or find_spec(module.partition(".")[0])}


def version_lines(errors: Mapping[str, str]) -> Iterator[Line]:
    """One line with all versions, and one for each required package that is missing or broken.

    `errors` are the reasons why packages cannot be imported.
    """
    python = platform.python_version()
    found = {name: installed(name) for name in (*NEEDED, *OTHER_BUILDS)}
    text = ", ".join(
        [__version__, f"Python {python}", *(f"{name} {number}" for name, number in found.items() if number)]
    )
    facts = {"capcli": __version__, "python": python, **found, "platform": platform.platform()}
    yield Line("capcli", "ok", text, facts={"versions": facts})
    for name in NEEDED:
        if found[name] is None:
            yield Line(name, "missing", "capcli needs it", fix=f"pip install {name}")
        elif name in errors:
            text = f"capcli needs it, and it cannot be imported: {errors[name]}"
            yield Line(name, "broken", text, fix=f"pip install --force-reinstall {name}")


def extra_lines(errors: Mapping[str, str], gpus: int) -> Iterator[Line]:
    """One line per extra and one for Java. `errors` are the reasons why packages cannot be imported."""
    for extra in USES:
        yield extra_line(extra, errors, gpus)
    named = {*NEEDED, *(name for extra in USES for name in packages(extra))}
    for name in errors.keys() - named:
        text = f"cannot be imported, and capcli does without it: {errors[name]}"
        yield Line(name, "broken", text, f"pip uninstall -y {name}")
    yield java_line()


def extra_line(extra: str, errors: Mapping[str, str], gpus: int) -> Line:
    use, needed = USES[extra], packages(extra)
    lacks = [name for name in needed if installed(name) is None]
    broken = {name: errors[name] for name in needed if name in errors}
    facts = {"lacks": lacks, "broken": broken}
    useless = extra in ON_GPU and not gpus
    if broken:
        text = "; ".join(f"{name} cannot be imported: {reason}" for name, reason in broken.items())
        fix = "pip uninstall -y" if useless else "pip install --force-reinstall"
        return Line(extra, "broken", f"{use}: {text}", f"{fix} {' '.join(broken)}", facts)
    if useless:
        text = "this machine has no NVIDIA GPU"
        return Line(extra, "none", f"{use}; {text}", facts=facts)
    if lacks:
        return Line(extra, "missing", f"{use}: lacks {', '.join(lacks)}", f"pip install 'capcli[{extra}]'", facts)
    return Line(extra, "ok", use, facts=facts)


def java_line() -> Line:
    """Run the Java program: on some systems it is a stub that only prints where to get Java."""
    from capcli.errors import CapcliError
    from capcli.metrics.java import java

    use = "METEOR and the PTB tokenizer of capcli evaluate"
    fix = "brew install openjdk" if platform.system() == "Darwin" else "apt-get install default-jre-headless"
    try:
        done = subprocess.run([java(), "-version"], capture_output=True, timeout=JAVA_TIMEOUT, stdin=subprocess.DEVNULL)
    except CapcliError:
        return Line("Java", "missing", f"{use}; without it: --without-java", fix)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Line("Java", "broken", f"{use}; it does not start: {error}", fix)
    first, *_ = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no version"]
    if done.returncode:
        return Line("Java", "broken", f"{use}; it does not start: {first}", fix)
    return Line("Java", "ok", f"{use}: {first}", facts={"version": first})


def runtime_lines(answers: Mapping[str, Answer], gpus: int) -> Iterator[Line]:
    """One line per runtime; `gpus` is the number of NVIDIA GPUs."""
    yield torch_line(answers["torch"], gpus)
    yield onnxruntime_line(answers["onnxruntime"], gpus)
    yield tensorrt_line(answers["tensorrt"], gpus)


def torch_line(answer: Answer, gpus: int) -> Line:
    name = "PyTorch"
    if answer.get("missing"):
        return Line(name, "missing", "capcli needs it", "pip install torch")
    if "error" in answer:
        return Line(name, "broken", f"does not work: {answer['error']}", REINSTALL_TORCH)
    devices, number = answer["devices"], answer["version"]
    facts = {"version": number, "cuda": answer["cuda"], "devices": [each["name"] for each in devices]}
    errors = [f"{each['name']}: {each['error']}" for each in devices if each["error"]]
    if errors:
        return Line(name, "broken", f"{number}: CPU; no CUDA: {'; '.join(errors)}", REINSTALL_TORCH, facts)
    if devices:
        count = "1 GPU" if len(devices) == 1 else f"{len(devices)} GPUs"
        return Line(name, "ok", f"{number}: CPU, CUDA ({count})", facts=facts)
    if not gpus:
        return Line(name, "ok", f"{number}: CPU", facts=facts)
    if answer["cuda"] is None:
        return Line(name, "missing", f"{number}: CPU only, built without CUDA", REINSTALL_TORCH, facts)
    reason = "; ".join(answer["warnings"]) or "it does not find the GPU (is CUDA_VISIBLE_DEVICES empty?)"
    return Line(name, "broken", f"{number}: CPU; no CUDA: {reason}", facts=facts)


def onnxruntime_line(answer: Answer, gpus: int) -> Line:
    name = ONNXRUNTIME.title
    if answer.get("missing"):
        fix = "pip install onnxruntime-gpu" if gpus else ONNXRUNTIME.install
        return Line(name, "missing", "not installed; ONNX engines need it", fix)
    if "error" in answer:
        fix = ONNXRUNTIME_GPU if gpus else REINSTALL_ONNXRUNTIME
        return Line(name, "broken", f"does not work: {answer['error']}", fix)
    number, providers, errors = answer["version"], answer["providers"], answer["errors"]
    facts = {"version": number, "providers": providers, "errors": errors}
    if errors.get(CPU):
        return Line(name, "broken", f"{number}: does not compute: {errors[CPU]}", REINSTALL_ONNXRUNTIME, facts)
    if gpus and CUDA not in providers:
        both = installed("onnxruntime-gpu") is not None  # both packages install the same module
        reason = "onnxruntime-gpu is shadowed by onnxruntime" if both else "this build has no CUDA"
        return Line(name, "missing", f"{number}: CPU only: {reason}", ONNXRUNTIME_GPU, facts)
    if gpus and errors.get(CUDA):
        fix = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        return Line(name, "broken", f"{number}: CPU; no CUDA: {errors[CUDA]}", fix, facts)
    devices = "CPU, CUDA" if gpus else "CPU"
    if release(number) < FUSED:
        text = f"{number}: {devices}; engines of --profile portable only, fused ones need {_dotted(FUSED)}"
        return Line(name, "missing", text, f"{ONNXRUNTIME.install} --upgrade", facts)
    return Line(name, "ok", f"{number}: {devices}", facts=facts)


def tensorrt_line(answer: Answer, gpus: int) -> Line:
    name, least = TENSORRT.title, _dotted(KEEPS)
    install = TENSORRT.install if gpus else None  # without a GPU no package helps
    no_gpu = "" if gpus else "it needs an NVIDIA GPU, and this machine has none"
    if answer.get("missing"):
        text = "; ".join(filter(None, [f"not installed (tensorrt {least} or newer)", no_gpu]))
        return Line(name, "missing" if gpus else "none", text, install)
    if "error" in answer:
        text = "; ".join(filter(None, [f"does not work: {answer['error']}", no_gpu]))
        return Line(name, "broken", text, install and f"{install} --force-reinstall")
    number = answer["version"]
    facts = {"version": number}
    if release(number) < KEEPS:
        text = f"{number} is too old: {least} or newer is needed"
        return Line(name, "missing", text, install and f"{install} --upgrade", facts)
    if no_gpu:
        return Line(name, "none", f"{number}, but {no_gpu}", facts=facts)
    return Line(name, "ok", f"{number}: CUDA", facts=facts)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
