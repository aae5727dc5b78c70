"""Every command that a document shows runs here, or is parsed and validated where it needs a GPU, a hub or data of one's own."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from running import PATIENCE, call, environment, shell
from vlms import MODELS

from capcli.cli import cli
from capcli.models.auto import IMAGE_TO_TEXT
from capcli.models.families import FILES
from capcli.models.model_files import VLMS

ROOT = Path(__file__).parents[1]
EARLIER = ROOT / "tests" / "earlier_version"
DOCUMENTS = ["README.md", "engines/README.md", "examples/README.md", "CONTRIBUTING.md", "BENCHMARKS.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FLAG = re.compile(r"(?<=\s)--[a-z-]+")
RUNS = {  # what each command calls once its options are validated
    "caption": "capcli.captioning.pipeline.run",
    "prepare": "capcli.prepare.run.run",
    "train": "capcli.training.run.run",
    "evaluate": "capcli.metrics.run.run",
    "export": "capcli.export.run.run",
    "bench": "capcli.bench.run.run",
    "doctor": "capcli.doctor.run.run",
    "models": "capcli.doctor.backends.run",
}
# Commands whose inputs the test makes itself; the others name models of the hub, data sets, a GPU, or take long.
RUN = (
    "capcli caption photo.jpg",
    "capcli caption ./photos --out beams.csv --num-beams 4",
    "find . -name '*.jpg' -print0 | capcli caption -0 - | jq -r .text",
    "capcli caption ./train --sidecar .txt",
    "capcli caption ./photos --out samples.jsonl --do-sample --top-p 0.9 --num-return-sequences 5 --seed 1",
    "capcli caption ./photos --model my-captioner --out captions.jsonl",
    "capcli prepare --data captions.txt --val-fraction 0.05 --out prepared",
    "capcli evaluate captions.jsonl --references captions.txt",
)


def shown(document: str) -> list[str]:
    """The lines of a document's code blocks in which `capcli` is run, without comments and prompts."""
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for kind, block in FENCED.findall(text) if not kind for line in block.splitlines()]
    commands = [re.sub(r" {2,}", " ", re.sub(r"\s+#.*$", "", line)).strip() for line in lines]
    return [command for command in commands if re.search(r"\bcapcli [a-z]", command)]


ALL = [(document, line) for document in DOCUMENTS for line in shown(document)]


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Every command ends where its work would begin."""
    with contextlib.ExitStack() as stack:
        for where in RUNS.values():
            stack.enter_context(mock.patch(where, return_value=0))
        yield


def test_every_document_shows_commands_and_every_command_is_shown() -> None:
    lines = [line for _, line in ALL]
    assert all(
        any(f"capcli {name}" in (ROOT / document).read_text() for document in DOCUMENTS) for name in cli.commands
    )
    assert set(RUN) <= set(lines)
    assert len(lines) > 30


@pytest.mark.parametrize(("document", "line"), ALL, ids=[line for _, line in ALL])
def test_a_shown_command_is_valid(document: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("examples", "engines"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "recipe.toml").symlink_to(ROOT / "examples" / "demo.toml")
    if "--resume" in line:
        shutil.copytree(EARLIER / "stopped", tmp_path / "my-captioner")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    arguments = words[words.index("capcli") + 1 :]
    if "|" in arguments:
        arguments = arguments[: arguments.index("|")]
    with nothing_runs():
        done = call(*arguments)
    assert done.code == 0, (document, done.err)


@pytest.mark.slow
def test_the_shown_commands_run(tmp_path: Path) -> None:
    scenes = sorted((ROOT / "examples" / "scenes").glob("*.jpg"))[:3]
    for folder in ("photos", "train"):
        (tmp_path / folder).mkdir()
        for scene in scenes:
            shutil.copy(scene, tmp_path / folder)
    shutil.copy(scenes[0], tmp_path / "photo.jpg")
    rows = [f"photos/{scene.name},a scene with number {n}" for n, scene in enumerate(scenes)]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *rows]) + "\n")
    shutil.copytree(EARLIER / "trained", tmp_path / "my-captioner")
    for line in RUN:
        if "jq" in line and shutil.which("jq") is None:
            line = line.replace("| jq -r .text", "| cat")
        # without --model the captioner would come from the hub; without Java there is no METEOR
        done = shell(
            f"cd {shlex.quote(str(tmp_path))} && {line}",
            CAPCLI_CAPTION_MODEL="my-captioner",
            CAPCLI_EVALUATE_WITHOUT_JAVA="1",
        )
        assert done.code == 0, (line, done.err)
    assert len((tmp_path / "beams.csv").read_text().splitlines()) == 1 + len(scenes)
    assert all((tmp_path / "train" / scene.name).with_suffix(".txt").exists() for scene in scenes)


@pytest.mark.slow
def test_the_scale_measurement_resumes_and_writes_a_row_for_every_image() -> None:
    command = [sys.executable, str(ROOT / "examples" / "measure_scale.py"), "--count", "2000"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "2,000 rows" in done.stdout


SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if "argparse" in path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_options_of_scripts_in_documents_exist(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), "--help"], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    used = {
        flag
        for text in texts
        for line in re.findall(rf"examples/{script.name}([^`\n]*)", text)
        for flag in FLAG.findall(line)
    }
    assert all(flag in done.stdout for flag in used), used


def test_the_make_targets_in_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    targets = {target for text in texts for target in re.findall(r"(?m)(?:^|`)make (?:PYTHON=\S+ )?([a-z-]+)", text)}
    assert targets >= {"demo", "test", "test-external", "check", "lint", "gpu-bench"}
    assert all(re.search(rf"(?m)^{target}:", makefile) for target in targets), targets


def test_the_table_of_models_states_what_the_code_and_the_tests_have() -> None:
    """Slots, generate, training and ONNX by `model_type`; every VLM in it is one of the checkpoints that tests caption with."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| `model_type` |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    found: dict[str, tuple[bool, ...]] = {}
    for names, *cells in rows:
        for kind in re.findall(r"`([\w.-]+)`", names.partition("; ")[0].partition(": ")[0]):
            found[kind] = tuple(cell.startswith("yes") for cell in cells[:4])
            assert ("LoRA" in cells[2]) == (kind in VLMS or kind in ("blip", "git", "florence2")), kind
    tested = set(map(config_kind, MODELS))
    assert set(VLMS) <= tested
    assert {*FILES, *tested} <= set(found)
    for kind, states in found.items():
        if kind in FILES or kind in IMAGE_TO_TEXT:
            assert states == (kind in FILES or kind in VLMS, True, kind in FILES, kind in FILES), kind


def config_kind(name: str) -> str:
    """The model_type of one of the tests' vision-language models."""
    return str(MODELS[name]()[0].config.model_type)
