"""The recipes in examples/: the real commands read them whole, and each trains a captioner that captions as it says."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shlex
import threading
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import transformers
from assembling import CAPTIONS, RINNA, save_bytes, save_decoder, save_encoder, save_pieces, write_json
from running import call, change_json, paint
from training import history

from capcli.models.vision_t5 import QUESTION
from capcli.options import GenerationOptions, PrepareOptions, TrainOptions
from capcli.training.output.folder import sources

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.toml"))
SYSTEMS = ("japanese", "flickr8k", "chinese", "lowcost")
ENGLISH = [caption for caption in dict.fromkeys(CAPTIONS) if caption.isascii()]
JAPANESE = ["犬が海辺を走っている", "赤い服の男の人が自転車に乗る", "公園で遊ぶ子供たち", "水たまりを飛びこえる女の子"]
# What decides neither what is learnt nor how captions are searched for, or cannot be said in words of TOML (None).
OPTIONAL = {
    *("max_steps", "unfreeze_after", "patience", "resume", "overwrite", "device", "threads", "workers", "quiet"),
    *("max_pixels", "decode_timeout", "data", "model", "generation", "task", "mask_patches"),
}
IDLE_WITHOUT_SAMPLING = {"temperature", "top_k", "top_p"}


def taken(command: str, recipe: Path, *more: str) -> Any:
    """What the real command makes of a recipe, instead of doing it."""
    where = {"prepare": "capcli.prepare.run.run", "train": "capcli.training.run.run"}[command]
    with mock.patch(where, return_value=0) as run:
        result = call(command, "--config", recipe, *more)
    assert result.code == 0, result.err
    return run.call_args.args[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_prepare_and_train_take_every_recipe_and_training_reads_what_prepare_wrote(recipe: Path) -> None:
    prepare: PrepareOptions = taken("prepare", recipe)
    train: TrainOptions = taken("train", recipe)
    assert prepare.out in {path for data in sources(train) for path in data.data}
    assert prepare.data.val_data or prepare.data.val_names or prepare.data.val_fraction
    assert prepare.edge >= image_size(train)
    for path in (*prepare.data.data, *prepare.data.val_data):
        read = Path(path) if Path(path).suffix == "" else Path(path).parent
        assert not Path(prepare.out).is_relative_to(read), "what is written lies among what is read"
        assert not Path(train.out).is_relative_to(read)


SIZES = {
    "Salesforce/blip-image-captioning-base": 384,
    "florence-community/Florence-2-base": 768,
    "build/encoder": 96,
    "microsoft/swinv2-base-patch4-window8-256": 256,
}  # of what is gone on from, and of encoders


def image_size(train: TrainOptions) -> int:
    if train.model.model is not None:
        return SIZES.get(train.model.model, 224)
    encoder = train.model.encoder
    return int(encoder["image_size"]) if isinstance(encoder, Mapping) else SIZES.get(str(encoder), 224)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_the_command_lines_it_is_for(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    for command in ("prepare", "train"):
        assert f"#   capcli {command} --config examples/{recipe.name}\n" in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_goes_on_from_a_captioner_and_takes_what_its_header_says(recipe: Path) -> None:
    model = taken("train", recipe, "--model", "captioner").model
    assert (model.model, model.encoder, model.decoder, model.extra_tokens) == ("captioner", None, None, 0)
    text = recipe.read_text(encoding="utf-8")
    for command, more in re.findall(rf"(?m)^# .*capcli (train|prepare) --config examples/{recipe.name}(.*)$", text):
        taken(command, recipe, *shlex.split(more, comments=True))


@pytest.mark.parametrize("system", SYSTEMS)
def test_recipes_of_systems_say_every_option_that_matters(system: str) -> None:
    sections = tomllib.loads((EXAMPLES / f"{system}.toml").read_text(encoding="utf-8"))
    said = {key for values in sections.values() for key in values}
    assert {each.name for each in fields(TrainOptions)} - OPTIONAL <= said
    search = sections["generation"]
    idle = {"seed"} | (set() if search["do_sample"] else IDLE_WITHOUT_SAMPLING)
    assert set(search) == {each.name for each in fields(GenerationOptions)} - idle


def test_the_japanese_recipe_is_system_1() -> None:
    prepare, train = taken("prepare", EXAMPLES / "japanese.toml"), taken("train", EXAMPLES / "japanese.toml")
    assert prepare.data.data == ("coco/stair_captions_v1.2_train.json",)
    assert prepare.data.val_data == ("coco/stair_captions_v1.2_val.json",)
    assert (train.data.val_limit, train.data.seed) == (0.01, 42)
    assert train.model.encoder == "google/vit-base-patch16-224-in21k"
    assert train.model.decoder == "rinna/japanese-gpt2-medium"
    assert (train.epochs, train.batch_size, train.warmup, train.weight_decay) == (5, 10, 500, 0.01)
    assert (train.evaluate_every, train.save_every, train.keep_best, train.select) == (500, 500, 3, "loss")
    assert train.generation == GenerationOptions(
        num_beams=5,
        do_sample=True,
        temperature=1.2,
        top_k=50,
        top_p=0.95,
        no_repeat_ngram_size=3,
        num_return_sequences=5,
        max_new_tokens=30,
        **neutral(),
    )


def test_the_flickr8k_recipe_is_system_2() -> None:
    prepare, train = taken("prepare", EXAMPLES / "flickr8k.toml"), taken("train", EXAMPLES / "flickr8k.toml")
    assert prepare.data.data == ("flickr8k/captions.txt",)
    assert prepare.data.val_fraction is not None
    assert (train.model.encoder, train.model.decoder) == ("google/vit-base-patch16-224", "gpt2")
    assert (train.learning_rate, train.warmup, train.weight_decay) == (5e-5, 1024, 0.01)
    assert (train.epochs, train.evaluate_every, train.model.max_length) == (3, "epoch", 50)
    assert train.caption_images > 0
    assert train.generation == GenerationOptions(
        num_beams=4,
        do_sample=False,
        no_repeat_ngram_size=3,
        num_return_sequences=1,
        max_new_tokens=50,
        **neutral(length_penalty=2.0, early_stopping=True),
    )


def test_the_chinese_recipe_is_system_3() -> None:
    prepare, train = taken("prepare", EXAMPLES / "chinese.toml"), taken("train", EXAMPLES / "chinese.toml")
    assert (prepare.url_column, prepare.data.caption_column) == ("image_path", "text")
    assert (train.model.encoder, train.model.decoder) == ("google/vit-base-patch16-224", "yuanzhoulvpi/gpt2_chinese")
    assert (train.batch_size, train.accumulation, train.epochs, train.dtype) == (48, 8, 1, "float16")
    assert (train.learning_rate, train.schedule, train.weight_decay) == (5e-4, "cosine", 0.1)
    assert train.generation == GenerationOptions(
        num_beams=4,
        do_sample=False,
        no_repeat_ngram_size=0,
        num_return_sequences=1,
        max_new_tokens=16,
        **neutral(),
    )


def test_the_low_cost_recipe_is_system_5() -> None:
    prepare, train = taken("prepare", EXAMPLES / "lowcost.toml"), taken("train", EXAMPLES / "lowcost.toml")
    assert prepare.data.data == ("coco/captions_train2017.json",)
    assert prepare.data.val_data == ("coco/captions_val2017.json",)
    assert (train.model.encoder, train.model.decoder, train.model.join) == ("microsoft/resnet-101", "gpt2", "prefix")
    assert (train.model.image_tokens, train.model.max_length, train.model.tokenizer) == (10, 20, None)
    assert train.freeze == "encoder"
    assert train.unfreeze_after is not None
    assert (train.schedule, train.dtype) == ("reduce_lr_on_plateau", "float16")
    assert train.generation == GenerationOptions(
        num_beams=5,
        do_sample=False,
        no_repeat_ngram_size=0,
        num_return_sequences=1,
        max_new_tokens=20,
        **neutral(),
    )


def test_the_multitask_recipe_is_system_4() -> None:
    train = taken("train", EXAMPLES / "multitask.toml")
    assert (train.model.encoder, train.model.decoder) == (
        "microsoft/swinv2-base-patch4-window8-256",
        "google-t5/t5-base",
    )
    assert (train.learning_rate, train.freeze, train.mask_patches, train.model.extra_tokens) == (
        1e-3,
        "encoder",
        0,
        1000,
    )
    assert train.accumulation > 1
    assert train.save_every
    tasks = {task.name: task for task in train.task}
    assert [task.kind for task in tasks.values()] == ["caption", "caption", "classify", "masked"]
    assert tasks["caption"].question == QUESTION
    assert tasks["classify"].data.label_template == "a photo of {label}"


def neutral(**but: Any) -> dict[str, Any]:
    return {"length_penalty": 1.0, "early_stopping": False, "repetition_penalty": 1.0, "min_new_tokens": 0} | but


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the commands run, where a recipe's files are expected; with an encoder and photos to caption."""
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "encoder")
    paint(tmp_path / "photos", "one.png", "two.jpg", "три.webp", seed=5)
    return tmp_path


def run_recipe(
    recipe: Path, *more: object, loader: Any = transformers.VisionEncoderDecoderModel
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The recipe's commands on what lies in the folder: the captioner's generation_config, and rows of captions."""
    out = taken("train", recipe).out
    prepared = call("prepare", "--config", recipe, "--workers", 0)
    assert prepared.code == 0, prepared.err
    parts = ("--encoder", "encoder", "--decoder", "decoder", "--dtype", "float32", "--device", "cpu", "--threads", 1)
    small = ("--max-steps", 2, "--evaluate-every", 2, "--save-every", 2, "--workers", 0, "--caption-images", 1)
    trained = call("train", "--config", recipe, *parts, *small)
    assert trained.code == 0, trained.err
    captioned = caption(out, *more)
    generation = json.loads(Path(out, "generation_config.json").read_text())
    said = tomllib.loads(recipe.read_text(encoding="utf-8"))["generation"]
    assert {name: generation[name] for name in said} == said
    loader.from_pretrained(out)
    return generation, captioned


def caption(model: str, *more: object) -> list[dict[str, Any]]:
    result = call("caption", "photos", "--model", model, "--device", "cpu", "--workers", 0, "--out", "-", *more)
    assert result.code == 0, result.err
    assert [row["file_name"] for row in result.rows] == ["one.png", "two.jpg", "три.webp"]
    return result.rows


def test_the_japanese_recipe_runs_and_gives_five_captions(place: Path) -> None:
    for split, count in (("train", 5), ("val", 3)):
        names = [f"COCO_{split}2014_{number:012}.jpg" for number in range(1, count + 1)]
        paint(place / "coco" / f"{split}2014", *names)
        write_json(place / "coco" / f"stair_captions_v1.2_{split}.json", stair(names))
    save_decoder(place / "decoder", vocabulary=140)
    if RINNA.exists():
        pieces = RINNA / "spiece.model"
        (place / "decoder" / "spiece.model").write_bytes(pieces.read_bytes())
    else:
        save_pieces(place / "decoder", JAPANESE * 8, character_coverage=1.0)
    _, rows = run_recipe(EXAMPLES / "japanese.toml")
    for row in rows:
        assert len(row["candidates"]) == 5
        assert row["text"] == row["candidates"][0]["text"]
    assert rows == caption("japanese")  # drawn with a seed


def stair(names: list[str], captions: list[str] = JAPANESE) -> dict[str, Any]:
    """Annotations in the layout of STAIR Captions, five to an image."""
    images = [{"id": number, "file_name": name} for number, name in enumerate(names, 1)]
    texts = [(image["id"], captions[(int(image["id"]) + n) % len(captions)]) for image in images for n in range(5)]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(texts)]
    return {"info": {}, "images": images, "annotations": annotations, "licenses": []}


def test_the_flickr8k_recipe_runs_and_samples_when_asked_to(place: Path) -> None:
    names = [f"{number}_photo.jpg" for number in range(10)]
    paint(place / "flickr8k" / "images", *names)
    rows = [f"{name},{ENGLISH[(n + k) % len(ENGLISH)]} ." for n, name in enumerate(names) for k in range(2)]
    (place / "flickr8k" / "captions.txt").write_text("\n".join(["image,caption", *rows]) + "\n")
    save_bytes(place / "decoder")
    save_decoder(place / "decoder", vocabulary=300)
    generation, rows = run_recipe(EXAMPLES / "flickr8k.toml")
    assert generation["eos_token_id"] == generation["pad_token_id"]
    assert all("candidates" not in row for row in rows)
    drawn = ("--num-beams", 1, "--do-sample", "--top-k", 1000, "--top-p", 0.95)
    one, other = (caption("flickr8k-captioner", *drawn, "--seed", seed) for seed in (1, 2))
    assert one != other


@pytest.fixture
def served(place: Path) -> Iterator[str]:
    """The address below which pictures are to be had."""
    paint(place / "web", *(f"{number}.jpg" for number in range(6)), "palette.gif", "gone.png")
    (place / "web" / "gone.png").unlink()
    handler = functools.partial(Quiet, directory=str(place / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


def test_the_chinese_recipe_runs_from_addresses_and_writes_no_spaces(place: Path, served: str) -> None:
    chinese = [caption for caption in dict.fromkeys(CAPTIONS) if not caption.isascii()]
    names = [*(f"{number}.jpg" for number in range(6)), "palette.gif"]
    rows = [f"{chinese[n % len(chinese)]},{served}/{name}" for n, name in enumerate(names)]
    (place / "chinese").mkdir()
    (place / "chinese" / "pairs.csv").write_text("\n".join(["text,image_path", *rows]) + "\n", encoding="utf-8")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(chinese)))]
    (place / "decoder").mkdir()
    (place / "decoder" / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    save_decoder(place / "decoder", vocabulary=len(vocabulary))
    change_json(place / "decoder" / "config.json", {"bos_token_id": 50256, "eos_token_id": 50256})  # as published
    generation, rows = run_recipe(EXAMPLES / "chinese.toml")
    assert vocabulary[generation["eos_token_id"]] == "[SEP]"
    assert all(row["text"] for row in rows)
    assert not any(" " in row["text"] for row in rows)


@pytest.mark.parametrize("tagged", [False, True], ids=["as it is", "with tags and a vocabulary of its own"])
def test_the_low_cost_recipe_runs(place: Path, tagged: bool) -> None:
    """The second time with the lines in force that it has as comments."""
    kind = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "bottleneck"}
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**kind)).save_pretrained(place / "encoder")
    processor = {"feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875, "size": 32, "resample": 3}
    write_json(place / "encoder" / "preprocessor_config.json", processor)
    save_bytes(place / "decoder")
    save_decoder(place / "decoder", vocabulary=300)
    for split, count in (("train", 6), ("val", 3)):
        names = [f"{number:012}.jpg" for number in range(count)]
        paint(place / "coco" / f"{split}2017", *names, seed=count)
        images = [{"id": n, "file_name": name, "tags": ["dog", "bark"][: n % 3]} for n, name in enumerate(names)]
        said = [{"id": n, "image_id": n % count, "caption": ENGLISH[n % len(ENGLISH)]} for n in range(2 * count)]
        write_json(place / "coco" / f"captions_{split}2017.json", {"images": images, "annotations": said})
    recipe, more = EXAMPLES / "lowcost.toml", ()
    if tagged:
        text = recipe.read_text(encoding="utf-8")
        for line in ('tags_column = "tags"', "tag_tokens = 16", 'tokenizer = "new"', "vocab_size = 15000"):
            assert f"\n# {line}" in text
            text = text.replace(f"\n# {line}", f"\n{line}")
        recipe, more = place / "tagged.toml", ("--tags-field", "tags")
        recipe.write_text(text, encoding="utf-8")
        (place / "photos" / "metadata.jsonl").write_text('{"file_name": "one.png", "tags": "[dog] [bark]"}\n')
    generation, _ = run_recipe(recipe, *more, loader=transformers.AutoModel)
    config = json.loads((place / "lowcost-captioner" / "config.json").read_text())
    assert (config["image_tokens"], config["tag_tokens"]) == (10, 16 if tagged else 0)
    assert generation["max_new_tokens"] == 20


def test_the_multitask_recipe_runs(place: Path) -> None:
    for split in ("train", "val"):
        names = [f"COCO_{split}2014_{number:012}.jpg" for number in range(1, 5)]
        paint(place / "coco" / f"{split}2014", *names)
        write_json(place / "coco" / f"captions_{split}2014.json", stair(names, ENGLISH))
        paint(place / "sun397", *(f"{split}/{label}/{n}.jpg" for label in ("abbey", "sea cliff") for n in range(2)))
    paint(place / "reddit", *(f"{n}.png" for n in range(4)))
    (place / "redcaps.csv").write_text("".join(["image,caption\n", *(f"reddit/{n}.png,a cat {n}\n" for n in range(4))]))
    prepared = call("prepare", "--data", "redcaps.csv", "--val-fraction", 0.25, "--out", "redcaps-prepared")
    assert prepared.code == 0, prepared.err
    save_pieces(place / "decoder", ENGLISH * 8)
    small = {"d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=300, **small)).save_pretrained("decoder")
    run_recipe(
        EXAMPLES / "multitask.toml", "--prompt", "a dog <extra_id_0> on the <extra_id_1>", loader=transformers.AutoModel
    )
    last = history(Path("multitask"))[-1]
    assert all(last[f"{task}_loss"] for task in ("caption", "redcaps", "classify", "masked"))
    assert last["classify_accuracy"]
