"""`capcli train`: its output loads in transformers, its figures are correct, and errors name the wrong option."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from assembling import write_json
from PIL import Image
from running import Ended, call
from safetensors.torch import load_file
from training import DECODER, ENCODER, MACHINE, history, paint_data, recipe
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

KEPT, EVERY, STEPS = 2, 4, 16


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Curves would take most of the time."""
    with mock.patch("capcli.training.loop.callbacks.draw_curves", return_value=None):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and a finished run in `out`."""
    place = tmp_path_factory.mktemp("train")
    config = recipe(
        place / "run.toml",
        paint_data(place / "pictures"),
        max_steps=STEPS,
        evaluate_every=EVERY,
        keep_best=KEPT,
        # The learning rate rises until it is far too high: the best checkpoints are not the last ones.
        learning_rate=0.1,
        warmup=STEPS,
    )
    result = call("train", "--config", config, "--out", place / "out")
    assert result.code == 0, result.err
    return place


def plain(folder: Path) -> tuple[Any, Any, Any]:
    """Model, tokenizer and processor, loaded by transformers."""
    model, report = VisionEncoderDecoderModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return (
        model.eval(),
        AutoTokenizer.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )


def captions(place: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (place / "pictures" / "captions.txt").read_text().splitlines()[1:]:
        name, text = line.split(",", 1)
        found.setdefault(name, []).append(text)
    return found


def pixels(place: Path, processor: Any, name: str) -> torch.Tensor:
    with Image.open(place / "pictures" / name) as image:
        values: torch.Tensor = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    return values


def validated(place: Path) -> list[str]:
    """The names of the validation images, from the function that the run uses."""
    from capcli.annotations import read_split
    from capcli.options import DataOptions

    data = DataOptions(data=(str(place / "pictures" / "captions.txt"),), val_fraction=0.25)
    return [each.name for each in read_split(data).val]


def mean_loss(place: Path, folder: Path) -> float:
    """The mean cross-entropy over the tokens of the validation captions, with transformers' loss on one caption at a time."""
    model, tokenizer, processor = plain(folder)
    names = validated(place)
    assert 0 < len(names) < len(captions(place))
    total, count = 0.0, 0
    for name in names:
        for text in captions(place)[name]:
            ids = [*tokenizer.encode(text, add_special_tokens=False)[:23], tokenizer.eos_token_id]
            with torch.no_grad():
                loss = model(pixel_values=pixels(place, processor, name), labels=torch.tensor([ids])).loss
            total, count = total + float(loss) * len(ids), count + len(ids)
    return total / count


def losses(place: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["val_loss"]) for row in history(place / "out") if row["val_loss"]}


def kept(place: Path) -> dict[int, Path]:
    return {int(path.name.split("-")[1]): path for path in (place / "out" / "checkpoints").iterdir()}


def test_the_validation_loss_is_that_of_the_checkpoint(place: Path) -> None:
    measured = losses(place)
    assert list(measured) == list(range(EVERY, STEPS + 1, EVERY))
    for step, folder in kept(place).items():
        assert math.isclose(mean_loss(place, folder), measured[step], rel_tol=1e-5)
    assert math.isclose(mean_loss(place, place / "out"), min(measured.values()), rel_tol=1e-5)
    assert len({round(value, 4) for value in measured.values()}) == len(measured)


def test_the_best_checkpoints_and_the_last_are_kept(place: Path) -> None:
    measured = losses(place)
    assert min(measured, key=measured.__getitem__) != STEPS
    assert set(kept(place)) == {*sorted(measured, key=measured.__getitem__)[:KEPT], STEPS}
    assert [step for step, folder in kept(place).items() if (folder / "optimizer.pt").exists()] == [STEPS]
    best = kept(place)[min(measured, key=measured.__getitem__)]
    assert (place / "out" / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_its_captions_are_those_of_generate(place: Path) -> None:
    model, tokenizer, processor = plain(place / "out")
    names = sorted(captions(place))
    result = call("caption", place / "pictures", "--model", place / "out", "--format", "jsonl", "--threads", 1)
    assert result.code == 0, result.err
    found = {os.path.basename(row["file_name"]): row["text"] for row in result.rows}
    assert sorted(found) == names
    with torch.no_grad():
        for name in names:
            tokens = model.generate(pixel_values=pixels(place, processor, name))
            assert found[name] == tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    assert any(found.values())


def test_images_per_second_are_plausible(place: Path) -> None:
    assert all(0 < float(row[MACHINE]) < 1e6 for row in history(place / "out"))


@pytest.mark.parametrize(
    ("name", "value"), [("learning-rate", "0.001"), ("batch-size", "2"), ("seed", "7"), ("max-length", "9")]
)
def test_a_run_is_not_resumed_with_other_settings(place: Path, name: str, value: str) -> None:
    before = (place / "out" / "train.toml").read_bytes()
    result = call("train", "--out", place / "out", "--resume", f"--{name}", value)
    assert result.code == 2
    assert f"{name.replace('-', '_')} = " in result.err
    assert value in result.err
    assert (place / "out" / "train.toml").read_bytes() == before


def test_a_run_is_not_overwritten_unasked(place: Path) -> None:
    result = call("train", "--config", place / "run.toml", "--out", place / "out")
    assert result.code == 2
    assert "--resume" in result.err
    assert "--overwrite" in result.err


def test_the_error_names_an_unknown_key(place: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run.toml", place / "pictures" / "captions.txt", learning_rat=0.1)
    result = call("train", "--config", config, "--out", tmp_path / "out")
    assert result.code == 2
    assert "learning_rat" in result.err
    assert "did you mean learning_rate?" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", [False, True], ids=["a file", "a table"])
def test_a_misspelt_key_of_a_config_is_refused_before_data_is_read(tmp_path: Path, table: bool) -> None:
    values = ENCODER | {"hidden_sise": 24, "colour": 1, "torch_dtype": "float32", "_name_or_path": ""}
    config = recipe(tmp_path / "run.toml", tmp_path / "nowhere.txt", model={"encoder": values} if table else None)
    write_json(tmp_path / "enc.json", values)
    more = () if table else ("--encoder", tmp_path / "enc.json")
    result = call("train", "--config", config, *more, "--out", tmp_path / "out")
    assert result.code == 2
    title = "the encoder table" if table else str(tmp_path / "enc.json")
    problem = "hidden_sise (did you mean hidden_size?), colour: vit has no such settings"
    assert result.err == f"capcli: {title} sets {problem}\n"
    assert not (tmp_path / "out").exists()


def test_extra_keys_of_saved_configs_and_a_small_vocabulary_are_notes(place: Path, tmp_path: Path) -> None:
    saved = {"transformers_version": "4.10.0", "architectures": ["ViTModel"], "torch_dtype": "float32"}
    encoder = write_json(tmp_path / "enc.json", ENCODER | saved | {"of_old": True, "layer_norm_eps": 1e-12})
    saved = {"architectures": ["GPT2LMHeadModel"], "task_specific_params": {"text-generation": {"max_length": 50}}}
    decoder = write_json(tmp_path / "dec.json", DECODER | saved | {"_num_labels": 1})
    config = recipe(tmp_path / "run.toml", place / "pictures" / "captions.txt", max_steps=1)
    parts = ("--encoder", encoder, "--decoder", decoder, "--vocab-size", 2000)
    result = call("train", "--config", config, *parts, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert f"{encoder} sets of_old: vit has no such setting\n" in result.err
    assert "no such setting" not in result.err.replace("of_old: vit has no such setting", "")
    tokens = len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert f"the new tokenizer has {tokens} tokens, fewer than --vocab-size 2,000" in result.err


def test_a_frozen_encoder_stays_as_it_was(place: Path, tmp_path: Path) -> None:
    """In a captioner that was trained before: random weights cannot be frozen."""
    config = tmp_path / "run.toml"
    data = place / "pictures" / "captions.txt"
    config.write_text(f'[train]\ndata = "{data}"\nmodel = "{place / "out"}"\nmax_steps = 3\nbatch_size = 4\n')
    result = train(config, tmp_path / "out", "--freeze", "encoder", "--learning-rate", 0.01)
    assert result.code == 0, result.err
    before, after = load_file(place / "out" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("decoder.", "enc_to_dec_proj.")) for name in changed)
    refused = call("train", "--config", place / "run.toml", "--out", tmp_path / "new", "--freeze", "encoder")
    assert refused.code == 2
    assert "encoder" in refused.err


def train(config: Path, out: Path, *arguments: object) -> Ended:
    return call(
        "train", "--config", config, "--out", out, "--device", "cpu", "--threads", 1, "--workers", 0, *arguments
    )


def test_an_unreadable_row_of_the_data_is_reported_and_listed(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    data.write_text(data.read_text().replace("image,caption", "image,caption,by").replace("square", "square,a,b,c", 1))
    lines = [line if "square,a" in line else f"{line},me" for line in data.read_text().splitlines()[1:]]
    data.write_text("\n".join(["image,caption,by", *lines]))
    result = call("train", "--config", recipe(tmp_path / "run.toml", data, max_steps=1), "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert f"1 row of {data} cannot be read: skipped; the first: {data}: line 2 has 5 cells" in result.err
    assert "left out: 1 row that cannot be read (" in result.err
    assert '"unreadable-row"' in (tmp_path / "out" / "data.failures.jsonl").read_text()


def test_a_count_of_one_is_in_the_singular(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures", 2)
    config = recipe(tmp_path / "run.toml", data, max_steps=1, caption_images=1)
    result = call("train", "--config", config, "--val-fraction", 0.5, "--max-length", 15, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "2 images, 4 captions; 1 image to train on, 1 to validate" in result.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained on 2 captions of 1 image, " in card
    assert "On 1 validation image, " in card
