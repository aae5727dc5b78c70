"""Settings files of models and engines with wrong values: each is one sentence, and nothing in them is printed raw."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from captioners import SIZE
from running import Ended, call, change_json, execute, paint
from transformers import ViTConfig, ViTModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from capcli.engine.engine_json import content_hash
from capcli.errors import CapcliError
from capcli.models.model_files import ENCODERS, PROCESSORS, collect_files, list_model
from capcli.options import GenerationOptions, ModelOptions
from capcli.options.export_command import checked_command
from capcli.training.model.assembly import assemble

ENGINE = Path(__file__).parent / "earlier_version" / "engine"
ESCAPE = "A\x1b]0;title\x07"
VALUES = (None, True, 0, 1, 3, -1, 1.5, 10**40, "x", ESCAPE, [], ["x"], [[]], {}, {"a": {}}, float("nan"))
WHOLE = ("[]", '"x"', "null", "", "{}", "[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000)
PER_FILE = 40  # values that are tried in each file, drawn from all
DEEP = 3

Place = tuple[str | int, ...]


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """The places of all values in a JSON document, to a depth of DEEP."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        if len(at) < DEEP and not (isinstance(item, dict | list) and len(item) > 40):
            yield from places(item, (*at, key))


def with_value(document: Any, place: Place, value: Any) -> Any:
    changed = copy.deepcopy(document)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


def wrong_texts(path: Path) -> Iterator[str]:
    """The file with other values, engine.json with a valid hash; and texts that are no settings at all."""
    document = json.loads(path.read_text())
    every = [(place, value) for place in places(document) for value in VALUES]
    for place, value in random.Random(0).sample(every, min(PER_FILE, len(every))):
        changed = with_value(document, place, value)
        if "hash" in changed:
            changed.pop("hash")
            changed["hash"] = content_hash(changed)
        yield json.dumps(changed)
    yield from WHOLE


def copied(model: Path, folder: Path, name: str, text: str) -> Path:
    """The model with another text in the file `name`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in model.iterdir():
        if path.is_file() and path.name != name:
            (folder / path.name).symlink_to(path)
    (folder / name).write_text(text)
    return folder


def captioned(photos: Path, model: Path, *options: object) -> Ended:
    return call("caption", photos, "--model", model, "--workers", "0", "--max-new-tokens", "2", *options)


def is_explained(done: Ended) -> bool:
    """Whether the command captioned, or said in plain text why it could not."""
    plain = "unexpected" not in done.err and "Traceback" not in done.err and "\x1b" not in done.err + done.out.decode()
    return done.code in (0, 1, 2, 3) and plain


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("photos"), "a.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"],
)
def test_wrong_settings_of_a_model_are_explained(name: str, captioner: Path, photos: Path, tmp_path: Path) -> None:
    for text in wrong_texts(captioner / name):
        done = captioned(photos, copied(captioner, tmp_path / "model", name, text))
        assert is_explained(done), (text[:500], done.err)


@pytest.mark.parametrize("name", ["engine.json", "config.json", "generation_config.json", "preprocessor_config.json"])
def test_wrong_settings_of_an_engine_are_explained(name: str, photos: Path, tmp_path: Path) -> None:
    for text in wrong_texts(ENGINE / name):
        done = captioned(photos, copied(ENGINE, tmp_path / "engine", name, text))
        assert is_explained(done), (text[:500], done.err)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5; it must be a token id or a list of token ids"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'; it must be a token id"),
        ({"suppress_tokens": "12"}, "suppress_tokens is '12'; it must be a list of token ids"),
        ({"begin_suppress_tokens": [1, None]}, "begin_suppress_tokens is [1, None]"),
        ({"bad_words_ids": [3]}, "bad_words_ids is [3]; it must be a list of lists of token ids"),
        ({"bad_words_ids": [[999_999]]}, "bad_words_ids: token 999999 is outside the decoder's vocabulary"),
        ({"bos_token_id": [1], "decoder_start_token_id": None}, "bos_token_id is [1]; it must be a token id"),
        ({"max_length": "20"}, "max_length is '20'; it must be a whole number"),
        ({"min_new_tokens": 3, "eos_token_id": 5_000}, "token 5000 is outside the decoder's vocabulary"),
    ],
)
def test_generation_settings_of_another_type(
    fields: dict[str, Any], words: str, captioner: Path, photos: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(captioner, tmp_path / "model")
    change_json(model / "generation_config.json", fields)
    done = call("caption", photos, "--model", model, "--workers", "0")
    assert done.code == 1
    assert words in done.err
    assert done.err.count("\n") == 1


def test_a_deeply_nested_header_of_weights_is_one_sentence(captioner: Path, photos: Path, tmp_path: Path) -> None:
    model = shutil.copytree(captioner, tmp_path / "model")
    header = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    done = execute("caption", photos, "--model", model)
    assert done.code == 1
    assert done.err == (
        f"capcli: {model / 'model.safetensors'} cannot be used: its header is damaged. Copy the model into its folder again.\n"
    )


def test_advice_to_rebuild_an_engine_is_only_ever_an_export(photos: Path, tmp_path: Path) -> None:
    engine = shutil.copytree(ENGINE, tmp_path / "engine")
    (engine / "step.onnx").write_bytes(b"another")
    honest = captioned(photos, engine)
    assert "Build it again: capcli export --onnx --model " in honest.err
    stored = json.loads((engine / "engine.json").read_text())
    for command in (
        ["rm", "-r", "/"],
        [*stored["command"], ";", "rm"],
        ["capcli", "export", "--onnx", "--model", ESCAPE],
    ):
        content = {**stored, "command": command}
        content.pop("hash")
        (engine / "engine.json").write_text(json.dumps({**content, "hash": content_hash(content)}))
        done = captioned(photos, engine)
        assert done.code == 1
        assert done.err == (
            f"capcli: {engine}/engine.json is damaged (its command is not an export): move the folder away and build the "
            "engine again\n"
        )


@pytest.mark.parametrize(
    "wrong", [["--model"], ["--num-beams", "$(date)"], ["--debug"], ["--dtype", "x y"], ["--out", "a\nb"]]
)
def test_commands_with_other_values_are_no_exports(wrong: list[str]) -> None:
    good = ("capcli", "export", "--trt", "--model", "my model", "--out", "x", "--batch-sizes", "1,8", "--force")
    assert checked_command(good) == good
    with pytest.raises(ValueError, match="not an export"):
        checked_command([*good, *wrong])


def test_an_adapter_names_its_base_model_and_how_to_merge(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/base", "peft_type": "LORA"})
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    done = call("export", "--onnx", "--model", tmp_path, "--out", tmp_path / "engine")
    assert done.code == 1
    assert "is an adapter (LoRA) of the model owner/base, not a whole model. capcli caption takes it" in done.err
    assert "merge_and_unload()" in done.err
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CapcliError, match="a model that it does not name"):
        collect_files("x", list_model(str(tmp_path)), None)


def test_a_tokenizer_of_another_model_is_warned_of(captioner: Path, photos: Path, tmp_path: Path) -> None:
    assert "tokenizer" not in captioned(photos, captioner).err
    model = shutil.copytree(captioner, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: n for word, n in vocabulary.items() if n < 20 or word.startswith("<")}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = captioned(photos, model)
    assert done.code == 0
    assert "capcli: the tokenizer has 23 tokens and the decoder 120: " in done.err


# Image processors that name no class


def without_class(model: Path, folder: Path, **settings: Any) -> Path:
    """The model with processor settings as those of the first checkpoints on the hub."""
    old = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": SIZE}
    return copied(model, folder, "preprocessor_config.json", json.dumps(old | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_processor_type": None},
        {"feature_extractor_type": "ViTFeatureExtractor"},
        {"feature_extractor_type": None, "resample": 2},
        {"processor_class": "SomeProcessor"},
    ],
)
def test_a_processor_without_a_class_goes_by_the_encoder(
    settings: dict[str, Any], captioner: Path, photos: Path, tmp_path: Path
) -> None:
    old = captioned(photos, without_class(captioner, tmp_path / "old", **settings))
    assert old.code == 0, old.err
    assert old.out == captioned(photos, captioner).out


def test_a_nested_processor_without_a_class(captioner: Path, photos: Path, tmp_path: Path) -> None:
    model = without_class(captioner, tmp_path / "old")
    (model / "preprocessor_config.json").rename(model / "processor_config.json")
    nested = {"image_processor": json.loads((model / "processor_config.json").read_text()), "processor_class": "X"}
    (model / "processor_config.json").write_text(json.dumps(nested))
    assert captioned(photos, model).out == captioned(photos, captioner).out


def test_the_processors_of_model_types_are_those_of_transformers() -> None:
    kinds = {*ENCODERS, "blip", "florence2", "git", "resnet"}
    known = kinds & IMAGE_PROCESSOR_MAPPING_NAMES.keys()  # the vision halves of CLIP and SigLIP have none
    assert {kind: IMAGE_PROCESSOR_MAPPING_NAMES[kind]["torchvision"] for kind in known} == PROCESSORS


def test_a_new_captioner_of_an_encoder_whose_processor_names_no_class(tmp_path: Path) -> None:
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(intermediate_size=32, **shape)).save_pretrained(tmp_path / "vit")
    settings = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    decoder = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32}
    options = ModelOptions(encoder=str(tmp_path / "vit"), decoder=decoder, tokenizer="new", extra_tokens=0)
    made = assemble(options, lambda: ["a dog runs", "two cats"], GenerationOptions(), seed=0, quiet=True)
    assert made.processor["image_processor_type"] == "ViTImageProcessor"
