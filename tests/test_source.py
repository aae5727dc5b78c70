"""The source keeps its own rules: imports in one direction, one name for one thing, plain language."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "capcli").rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in (
        "capcli/**/*.py",
        "tests/*.py",
        "examples/*.py",
        "examples/*.toml",
        "engines/*.toml",
        "**/*.md",
        "Makefile",
    )
    for path in ROOT.glob(pattern)
    if not {".venv", "build", "earlier_version", "demo-model"} & set(path.relative_to(ROOT).parts)
    and path != Path(__file__)
)
# Phrases that are no technical English, or a second name for a thing that has one.
REFUSED = {
    r"\banew\b": "again, from scratch",
    r"\bheed\w*": "follow, honour, poll",
    r"\breceipts?\b": "run file",
    r"\bwho (sits|stands)\b": "which image is in which slot",
    r"\bleaves? word\b": "records",
    r"\b(is|are|be|was) told\b": "gets, reads, is given",
    r"\ba little other\b": "slightly different",
    r"\bstrange(r|rs|ly)?\b": "unexpected, unknown, invalid",
    r"\bthereof\b|\bwhereof\b|\bwherein\b": "of it",
    r"\bsays? the next word\b|\bwords? (it|they) says?\b": "token",
    r"\bmoods?\b": "noise",
    r"\bcaptioners? (says?|said)\b": "gives, generates",
    r"\briddles?\b": "",
}
# The same job in several folders: a command on one page, what it prints, the folder that it writes.
SHARED_NAMES = {"__init__.py", "run.py", "output.py", "folder.py"}
MIRRORED = {"cli", "options"}  # a file for each command in both


def test_imports_keep_the_layers_and_make_no_circle() -> None:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path in MODULES:
        family = path.parent.name == "models"  # whose files each have an Encode and a Step
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not (family and node.name in ("Encode", "Step")):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_two_modules_have_one_name_unless_they_do_the_same_job() -> None:
    places = defaultdict(list)
    for path in MODULES:
        if path.name not in SHARED_NAMES:
            places[path.name].append(path.parent.name)
    assert {name: found for name, found in places.items() if len(found) > 1 and not set(found) <= MIRRORED} == {}


def test_the_language_is_plain() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]} ({instead or 'leave it out'})"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for phrase, instead in REFUSED.items()
        if re.search(phrase, line, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)
