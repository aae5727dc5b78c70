"""Looks at everything and shows it. No runtime is imported here: each is looked at in a process of its own (`probe`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from capcli.doctor import output
from capcli.doctor.asking import Answer, ask
from capcli.doctor.findings import Section, section
from capcli.doctor.local_models import Here, look_at_engines, look_at_models
from capcli.doctor.machine import find_gpus, look_at_cpu, look_at_gpus
from capcli.doctor.runtimes import look_at_runtimes
from capcli.doctor.versions import look_at_extras, look_at_versions


def run(*, as_json: bool) -> int:
    """Shows what is found on standard output; the exit code, 0 whatever that is."""
    sections = examine()
    if as_json:
        print(output.document(sections))
    elif sys.stdout.isatty():
        output.table(sections)
    else:
        output.plain(sections)
    return 0


def examine() -> list[Section]:
    """Everything that is looked at. What is broken is a line, and no error."""
    answers = ask(("torch", "onnxruntime", "tensorrt"))
    gpus, trouble = find_gpus(answers["torch"])
    here = Here(versions_of(answers), gpus)
    return [
        section("versions", "Versions", look_at_versions),
        section("cpu", "Processor", lambda: look_at_cpu(answers["torch"])),
        section("gpus", "GPUs", lambda: look_at_gpus(gpus, trouble)),
        section("runtimes", "Runtimes", lambda: look_at_runtimes(answers, len(gpus))),
        section("extras", "Extras", look_at_extras),
        section("models", "Cached captioners", look_at_models),
        section("engines", "Engines", lambda: look_at_engines(here)),
    ]


def versions_of(answers: Mapping[str, Answer]) -> dict[str, str]:
    return {name: answer["version"] for name, answer in answers.items() if "version" in answer}
