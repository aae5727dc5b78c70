"""`capcli train`: what it leaves is a plain captioner, its figures are true, and wrong commands are refused by name."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from assembling import write_json
from PIL import Image
from running import Ended, call
from safetensors.torch import load_file
from training import DECODER, ENCODER, MACHINE, history, paint_data, recipe
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

KEPT, EVERY, STEPS = 2, 4, 16


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
        # A learning rate that rises until it is far too high: the best checkpoints are not the last.
        learning_rate=0.1,
        warmup=STEPS,
    )
    result = call("train", "--config", config, "--out", place / "out")
    assert result.code == 0, result.err
    return place


def plain(folder: Path) -> tuple[Any, Any, Any]:
    """The model, tokenizer and processor as transformers alone loads them."""
    made, report = VisionEncoderDecoderModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return made.eval(), AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, backend="pil")


def captions(place: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (place / "pictures" / "captions.txt").read_text().splitlines()[1:]:
        name, text = line.split(",", 1)
        found.setdefault(name, []).append(text)
    return found


def pixels(place: Path, processor: Any, name: str) -> torch.Tensor:
    with Image.open(place / "pictures" / name) as image:
        made: torch.Tensor = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    return made


def validated(place: Path) -> list[str]:
    """The images that validate, by the rule that the run itself uses."""
    from capcli.annotations import read_split
    from capcli.options import DataOptions

    data = DataOptions(data=(str(place / "pictures" / "captions.txt"),), val_fraction=0.25)
    return [each.name for each in read_split(data).val]


def mean_loss(place: Path, folder: Path) -> float:
    """The cross-entropy of a token of the validation captions, caption by caption, with transformers' own loss."""
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


def test_the_validation_loss_is_the_checkpoints(place: Path) -> None:
    said = losses(place)
    assert list(said) == list(range(EVERY, STEPS + 1, EVERY))
    for step, folder in kept(place).items():
        assert math.isclose(mean_loss(place, folder), said[step], rel_tol=1e-5)
    assert math.isclose(mean_loss(place, place / "out"), min(said.values()), rel_tol=1e-5)
    assert len({round(value, 4) for value in said.values()}) == len(said)


def test_the_best_checkpoints_are_kept_and_the_last(place: Path) -> None:
    said = losses(place)
    assert min(said, key=said.__getitem__) != STEPS
    assert set(kept(place)) == {*sorted(said, key=said.__getitem__)[:KEPT], STEPS}
    assert [step for step, folder in kept(place).items() if (folder / "optimizer.pt").exists()] == [STEPS]
    best = kept(place)[min(said, key=said.__getitem__)]
    assert (place / "out" / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_it_captions_as_generate_does(place: Path) -> None:
    model, tokenizer, processor = plain(place / "out")
    names = sorted(captions(place))
    result = call("caption", place / "pictures", "--model", place / "out", "--format", "jsonl", "--threads", 1)
    assert result.code == 0, result.err
    said = {os.path.basename(row["file_name"]): row["text"] for row in result.rows}
    assert sorted(said) == names
    with torch.no_grad():
        for name in names:
            made = model.generate(pixel_values=pixels(place, processor, name))
            assert said[name] == tokenizer.decode(made[0], skip_special_tokens=True).strip()
    assert any(said.values())


def test_images_per_second_could_be_true(place: Path) -> None:
    assert all(0 < float(row[MACHINE]) < 1e6 for row in history(place / "out"))


@pytest.mark.parametrize(
    ("name", "value"), [("learning-rate", "0.001"), ("batch-size", "2"), ("seed", "7"), ("max-length", "9")]
)
def test_a_run_does_not_go_on_with_other_settings(place: Path, name: str, value: str) -> None:
    before = (place / "out" / "train.toml").read_bytes()
    result = call("train", "--out", place / "out", "--resume", f"--{name}", value)
    assert result.code == 2
    assert f"{name.replace('-', '_')} = " in result.err
    assert value in result.err
    assert (place / "out" / "train.toml").read_bytes() == before


def test_a_run_is_not_trodden_on(place: Path) -> None:
    result = call("train", "--config", place / "run.toml", "--out", place / "out")
    assert result.code == 2
    assert "--resume" in result.err
    assert "--overwrite" in result.err


def test_an_unknown_key_is_named(place: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run.toml", place / "pictures" / "captions.txt", learning_rat=0.1)
    result = call("train", "--config", config, "--out", tmp_path / "out")
    assert result.code == 2
    assert "learning_rat" in result.err
    assert "did you mean learning_rate?" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", [False, True], ids=["a file", "a table"])
def test_a_misspelt_key_of_a_config_is_named_before_data_are_read(tmp_path: Path, table: bool) -> None:
    values = ENCODER | {"hidden_sise": 24, "colour": 1, "torch_dtype": "float32", "_name_or_path": ""}
    config = recipe(tmp_path / "run.toml", tmp_path / "nowhere.txt", model={"encoder": values} if table else None)
    write_json(tmp_path / "enc.json", values)
    more = () if table else ("--encoder", tmp_path / "enc.json")
    result = call("train", "--config", config, *more, "--out", tmp_path / "out")
    assert result.code == 2
    title = "the encoder table" if table else str(tmp_path / "enc.json")
    said = "hidden_sise (did you mean hidden_size?), colour: vit has no such settings"
    assert result.err == f"capcli: {title} sets {said}\n"
    assert not (tmp_path / "out").exists()


def test_what_transformers_saved_may_hold_more_and_a_small_vocabulary_is_told(place: Path, tmp_path: Path) -> None:
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
    assert f"the new tokenizer has {tokens} tokens, not the 2,000 of --vocab-size" in result.err


def test_a_frozen_encoder_stays_as_it_was(place: Path, tmp_path: Path) -> None:
    """Of a captioner that was trained before, as random weights are not frozen."""
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


def test_a_row_of_the_data_that_cannot_be_read_is_told_and_listed(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    data.write_text(data.read_text().replace("image,caption", "image,caption,by").replace("square", "square,a,b,c", 1))
    lines = [line if "square,a" in line else f"{line},me" for line in data.read_text().splitlines()[1:]]
    data.write_text("\n".join(["image,caption,by", *lines]))
    result = call("train", "--config", recipe(tmp_path / "run.toml", data, max_steps=1), "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert f"1 row of {data} cannot be read: skipped; the first: {data}: line 2 has 5 cells" in result.err
    assert "left out: 1 row that cannot be read (" in result.err
    assert '"unreadable-row"' in (tmp_path / "out" / "data.failures.jsonl").read_text()


def test_one_of_a_thing_is_said_in_the_singular(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures", 2)
    config = recipe(tmp_path / "run.toml", data, max_steps=1, caption_images=1)
    result = call("train", "--config", config, "--val-fraction", 0.5, "--max-length", 15, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "2 images, 4 captions; 1 image to train on, 1 to validate" in result.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from 2 captions of 1 image and knows little" in card
    assert "On 1 validation image, " in card
