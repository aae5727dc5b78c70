"""What each runtime can do here: PyTorch, ONNX Runtime, TensorRT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from capcli.doctor.asking import Answer
from capcli.doctor.findings import Line
from capcli.doctor.versions import installed
from capcli.engine.packages import FUSED, KEEPS, ONNXRUNTIME, TENSORRT, release

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
TORCH_FOR_CUDA = "pip install --force-reinstall torch"  # what a bare name gives on Linux is built for CUDA
ONLY_GPU = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def look_at_runtimes(answers: Mapping[str, Answer], gpus: int) -> Iterator[Line]:
    """`gpus` is how many NVIDIA GPUs the machine has."""
    yield look_at_torch(answers["torch"], gpus)
    yield look_at_onnxruntime(answers["onnxruntime"], gpus)
    yield look_at_tensorrt(answers["tensorrt"], gpus)


def look_at_torch(told: Answer, gpus: int) -> Line:
    name = "PyTorch"
    if told.get("missing"):
        return Line(name, "missing", "capcli needs it", "pip install torch")
    if "error" in told:
        return Line(name, "broken", f"does not work: {told['error']}", TORCH_FOR_CUDA)
    devices, version = told["devices"], told["version"]
    facts = {"version": version, "cuda": told["cuda"], "devices": [each["name"] for each in devices]}
    broken = [f"{each['name']}: {each['error']}" for each in devices if each["error"]]
    if broken:
        return Line(name, "broken", f"{version}: CPU; no CUDA: {'; '.join(broken)}", TORCH_FOR_CUDA, facts)
    if devices:
        shown = "1 GPU" if len(devices) == 1 else f"{len(devices)} GPUs"
        return Line(name, "ok", f"{version}: CPU, CUDA ({shown})", facts=facts)
    if not gpus:
        return Line(name, "ok", f"{version}: CPU", facts=facts)
    if told["cuda"] is None:
        return Line(name, "missing", f"{version}: CPU only, for it is built without CUDA", TORCH_FOR_CUDA, facts)
    why = "; ".join(told["warnings"]) or "it does not find the GPU (is CUDA_VISIBLE_DEVICES empty?)"
    return Line(name, "broken", f"{version}: CPU; no CUDA: {why}", facts=facts)


def look_at_onnxruntime(told: Answer, gpus: int) -> Line:
    name = ONNXRUNTIME.title
    if told.get("missing"):
        package = "pip install onnxruntime-gpu" if gpus else ONNXRUNTIME.install
        return Line(name, "missing", "not installed; engines of ONNX graphs run in it", package)
    if "error" in told:
        fix = ONLY_GPU if gpus else "pip install --force-reinstall onnxruntime"
        return Line(name, "broken", f"does not work: {told['error']}", fix)
    version, providers, errors = told["version"], told["providers"], told["errors"]
    facts = {"version": version, "providers": providers, "errors": errors}
    if errors.get(CPU):
        fix = "pip install --force-reinstall onnxruntime"
        return Line(name, "broken", f"{version}: computes nothing: {errors[CPU]}", fix, facts)
    if gpus and CUDA not in providers:
        both = installed("onnxruntime-gpu") is not None  # two packages of one module: the later one hides the other
        why = "onnxruntime-gpu is hidden by onnxruntime" if both else "this build has no CUDA"
        return Line(name, "missing", f"{version}: CPU only: {why}", ONLY_GPU, facts)
    if gpus and errors.get(CUDA):
        fix = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        return Line(name, "broken", f"{version}: CPU; no CUDA: {errors[CUDA]}", fix, facts)
    able = "CPU, CUDA" if gpus else "CPU"
    if release(version) < FUSED:
        least = ".".join(map(str, FUSED))
        text = f"{version}: {able}; engines of --profile portable only, for fused ones need {least}"
        return Line(name, "missing", text, f"{ONNXRUNTIME.install} --upgrade", facts)
    return Line(name, "ok", f"{version}: {able}", facts=facts)


def look_at_tensorrt(told: Answer, gpus: int) -> Line:
    name, least = TENSORRT.title, ".".join(map(str, KEEPS))
    install = TENSORRT.install if gpus else None  # which mends nothing where there is no GPU
    lacks = [] if gpus else ["an NVIDIA GPU, which this machine lacks"]
    if told.get("missing"):
        wants = " and ".join([f"the package tensorrt {least} or newer", *lacks])
        return Line(name, "missing" if gpus else "none", f"not installed; needed: {wants}", install)
    if "error" in told:
        text = f"does not work: {told['error']}" + "".join(f"; it needs {each}" for each in lacks)
        return Line(name, "broken", text, install and f"{install} --force-reinstall")
    version = told["version"]
    facts = {"version": version}
    if release(version) < KEEPS:
        upgrade = install and f"{install} --upgrade"
        return Line(name, "missing", f"{version} is too old: {least} or newer is needed", upgrade, facts)
    if lacks:
        return Line(name, "none", f"{version}, but it needs {lacks[0]}", facts=facts)
    return Line(name, "ok", f"{version}: CUDA", facts=facts)
