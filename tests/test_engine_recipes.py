"""The recipes in engines/: each says what `capcli export` is to build, and only what it knows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from unittest import mock

import pytest
from running import call

from capcli.export import run
from capcli.options import DEFAULT_MODEL, ExportOptions

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "engines").glob("*.toml"))
TRAINED = ("japanese", "flickr8k", "chinese")  # by the recipe of the same name in examples/


def asked(*arguments: object) -> ExportOptions:
    """What `capcli export` is asked for by these arguments."""
    given: list[ExportOptions] = []
    with mock.patch.object(run, "run", given.append):
        done = call("export", *arguments)
    assert (done.code, done.err) == (0, "")
    return given[0]


def test_there_is_one_for_the_default_captioner_and_for_each_that_the_examples_train() -> None:
    assert [path.stem for path in RECIPES] == sorted(["vit-gpt2", *TRAINED])
    readme = (ROOT / "engines" / "README.md").read_text()
    assert {path.name for path in RECIPES} <= set(re.findall(r"`([\w-]+\.toml)`", readme))
    assert asked("--recipe", ROOT / "engines" / "vit-gpt2.toml").model == DEFAULT_MODEL


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_reaches_the_command(path: Path) -> None:
    wanted = tomllib.loads(path.read_text())["export"]
    assert wanted.pop("onnx") is True
    found = asked("--recipe", path)
    assert found.kind == "onnx"
    assert {name: getattr(found, name) for name in wanted} == wanted | {"batch_sizes": tuple(wanted["batch_sizes"])}


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_captioner_is_taken_from_where_its_example_leaves_it_and_searched_as_there(name: str) -> None:
    example = tomllib.loads((ROOT / "examples" / f"{name}.toml").read_text())
    found = asked("--recipe", ROOT / "engines" / f"{name}.toml")
    assert found.model == example["train"]["out"]
    generation = example["generation"]
    assert (found.num_beams, found.max_new_tokens) == (generation["num_beams"], generation["max_new_tokens"])


@pytest.mark.parametrize("path", [*RECIPES, ROOT / "engines" / "README.md"], ids=lambda path: path.stem)
def test_the_commands_it_shows_are_commands(path: Path) -> None:
    lines = re.findall(r"^#? *(capcli export .*?)(?: {2,}#.*)?$", path.read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        words = [word.replace("engines/", f"{ROOT}/engines/") for word in line.split()[2:]]
        asked(*words)


def test_flags_win_over_a_recipe() -> None:
    path = ROOT / "engines" / "flickr8k.toml"
    found = asked("--recipe", path, "--trt", "--dtype", "float16", "--num-beams", 1, "--batch-sizes", "2,4")
    assert (found.kind, found.dtype, found.num_beams, found.batch_sizes) == ("tensorrt", "float16", 1, (2, 4))
    assert found.max_new_tokens == 50


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[export]\nonnx = true\nbeams = 4", "beams in [export] is not an option"),
        ("[export]\nkind = 'onnx'", "kind in [export] is not an option"),
        ("[export]\nonnx = 'perhaps'", "onnx"),
        ("[export]\nonnx = true\ndtype = 'float8'", "float8"),
        ("[export]\nonnx = false", "--onnx or --trt"),
        ("onnx = true", "in no section"),
        ("[export", "TOML"),
    ],
)
def test_a_wrong_recipe_is_told_before_anything_is_done(tmp_path: Path, text: str, words: str) -> None:
    recipe = tmp_path / "a recipe.toml"
    recipe.write_text(text)
    done = call("export", "--recipe", recipe, "--model", tmp_path / "none")
    assert done.code == 2
    assert words in done.err


def test_a_recipe_can_say_plans(tmp_path: Path) -> None:
    recipe = tmp_path / "plans.toml"
    recipe.write_text("[export]\ntrt = true\nonnx = false\n")
    assert asked("--recipe", recipe).kind == "tensorrt"
