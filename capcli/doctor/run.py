"""The main function of `capcli doctor`. No runtime is imported here: each is examined in a separate process (`probe`)."""

from __future__ import annotations

from capcli.doctor import output
from capcli.doctor.local_models import engine_lines, model_lines
from capcli.doctor.machine import cpu_lines, find_gpus, gpu_lines
from capcli.doctor.output import Section, section
from capcli.doctor.probe import import_errors, probe_all
from capcli.doctor.software import extra_lines, modules, runtime_lines, version_lines


def run(*, as_json: bool) -> int:
    """Print the findings on standard output. The exit code is always 0."""
    output.show(examine(), as_json=as_json)
    return 0


def examine() -> list[Section]:
    """All findings. A broken part becomes a line, not an exception."""
    answers = probe_all(("torch", "onnxruntime", "tensorrt"))
    errors = import_errors(modules())
    versions = {name: answer["version"] for name, answer in answers.items() if "version" in answer}
    gpus, problem = find_gpus(answers["torch"])
    return [
        section("versions", "Versions", lambda: version_lines(errors)),
        section("cpu", "Processor", lambda: cpu_lines(answers["torch"])),
        section("gpus", "GPUs", lambda: gpu_lines(gpus, problem)),
        section("runtimes", "Runtimes", lambda: runtime_lines(answers, len(gpus))),
        section("extras", "Extras", lambda: extra_lines(errors, len(gpus))),
        section("models", "Cached captioners", model_lines),
        section("engines", "Engines", lambda: engine_lines(versions, gpus)),
    ]
