"""The recipes in engines/: their keys are options of `capcli export`, and the commands in them are valid."""

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


def options_of(*arguments: object) -> ExportOptions:
    """The options that `capcli export` makes of these arguments."""
    options: list[ExportOptions] = []
    with mock.patch.object(run, "run", options.append):
        done = call("export", *arguments)
    assert (done.code, done.err) == (0, "")
    return options[0]


def test_the_default_captioner_and_each_of_the_examples_have_a_recipe() -> None:
    assert [path.stem for path in RECIPES] == sorted(["vit-gpt2", *TRAINED])
    readme = (ROOT / "engines" / "README.md").read_text()
    assert {path.name for path in RECIPES} <= set(re.findall(r"`([\w-]+\.toml)`", readme))
    assert options_of("--recipe", ROOT / "engines" / "vit-gpt2.toml").model == DEFAULT_MODEL


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_reaches_the_command(path: Path) -> None:
    keys = tomllib.loads(path.read_text())["export"]
    assert keys.pop("onnx") is True
    options = options_of("--recipe", path)
    assert options.kind == "onnx"
    assert {name: getattr(options, name) for name in keys} == keys | {"batch_sizes": tuple(keys["batch_sizes"])}


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_of_an_example_has_its_output_folder_and_its_search(name: str) -> None:
    example = tomllib.loads((ROOT / "examples" / f"{name}.toml").read_text())
    found = options_of("--recipe", ROOT / "engines" / f"{name}.toml")
    assert found.model == example["train"]["out"]
    generation = example["generation"]
    assert (found.num_beams, found.max_new_tokens) == (generation["num_beams"], generation["max_new_tokens"])


@pytest.mark.parametrize("path", [*RECIPES, ROOT / "engines" / "README.md"], ids=lambda path: path.stem)
def test_the_commands_in_a_file_are_valid(path: Path) -> None:
    lines = re.findall(r"^#? *(capcli export .*?)(?: {2,}#.*)?$", path.read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        arguments = [word.replace("engines/", f"{ROOT}/engines/") for word in line.split()[2:]]
        options_of(*arguments)


def test_flags_win_over_a_recipe() -> None:
    path = ROOT / "engines" / "flickr8k.toml"
    found = options_of("--recipe", path, "--trt", "--dtype", "float16", "--num-beams", 1, "--batch-sizes", "2,4")
    assert (found.kind, found.dtype, found.num_beams, found.batch_sizes) == ("tensorrt", "float16", 1, (2, 4))
    assert found.max_new_tokens == 50


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_a_wrong_recipe_is_refused_first(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "a recipe.toml"
    recipe.write_text(text)
    done = call("export", "--recipe", recipe, "--model", tmp_path / "none")
    assert done.code == 2
    assert message in done.err


def test_a_recipe_may_be_for_plans(tmp_path: Path) -> None:
    recipe = tmp_path / "plans.toml"
    recipe.write_text("[export]\ntrt = true\nonnx = false\n")
    assert options_of("--recipe", recipe).kind == "tensorrt"
