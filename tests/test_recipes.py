"""The recipes in examples/: the commands accept them, their parts can be assembled, and they train captioners that caption."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shlex
import threading
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import transformers
from assembling import CAPTIONS, RINNA, save_bytes, save_decoder, save_encoder, save_pieces, write_json
from running import call, change_json, paint
from training import history

from capcli.options import GenerationOptions, PrepareOptions, TrainOptions
from capcli.training.model.assembly import assemble
from capcli.training.output.folder import sources

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.toml"))
COMPLETE = ("japanese", "flickr8k", "chinese", "lowcost")  # recipes that set every option that matters
ENGLISH = [caption for caption in dict.fromkeys(CAPTIONS) if caption.isascii()]
JAPANESE = ["犬が海辺を走っている", "赤い服の男の人が自転車に乗る", "公園で遊ぶ子供たち", "水たまりを飛びこえる女の子"]
# Options that change neither what is learned nor the search, whose default TOML cannot write (None), or that are sections.
OPTIONAL = {
    *("max_steps", "unfreeze_after", "patience", "resume", "overwrite", "device", "threads", "workers", "quiet"),
    *("max_pixels", "decode_timeout", "data", "model", "generation", "task", "mask_patches"),
    *("lora", "lora_rank", "lora_alpha", "lora_targets", "prompt", "system"),
}
ONLY_SAMPLING = {"temperature", "top_k", "top_p"}
# Image sizes of pretrained encoders and captioners; the others take 224.
SIZES = {
    "Salesforce/blip-image-captioning-base": 384,
    "florence-community/Florence-2-base": 768,
    "build/encoder": 96,
    "microsoft/swinv2-base-patch4-window8-256": 256,
}

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def parsed(command: str, recipe: Path, *more: str) -> Any:
    """The options that the real command passes on; the command's work is replaced."""
    where = {"prepare": "capcli.prepare.run.run", "train": "capcli.training.run.run"}[command]
    with mock.patch(where, return_value=0) as run:
        result = call(command, "--config", recipe, *more)
    assert result.code == 0, result.err
    return run.call_args.args[0]


def image_size(train: TrainOptions) -> int:
    encoder = train.model.model or train.model.encoder
    return int(encoder["image_size"]) if isinstance(encoder, Mapping) else SIZES.get(str(encoder), 224)


@each_recipe
def test_training_reads_what_prepare_wrote_large_enough(recipe: Path) -> None:
    prepare: PrepareOptions = parsed("prepare", recipe)
    train: TrainOptions = parsed("train", recipe)
    assert prepare.out in {path for data in sources(train) for path in data.data}
    assert prepare.data.val_data or prepare.data.val_names or prepare.data.val_fraction
    assert prepare.edge >= image_size(train)
    for path in (*prepare.data.data, *prepare.data.val_data):
        read = Path(path) if Path(path).suffix == "" else Path(path).parent
        assert not Path(prepare.out).is_relative_to(read), "the output is inside the input"
        assert not Path(train.out).is_relative_to(read), "the output is inside the input"


@each_recipe
def test_the_commands_in_a_header_are_accepted(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    commands = re.findall(rf"(?m)^# .*capcli (train|prepare) --config examples/{recipe.name}(.*)$", text)
    assert {("train", ""), ("prepare", "")} <= set(commands)
    for command, more in commands:
        if more:
            parsed(command, recipe, *shlex.split(more, comments=True))


@each_recipe
def test_a_recipe_can_start_from_a_trained_captioner(recipe: Path) -> None:
    model = parsed("train", recipe, "--model", "captioner").model
    assert (model.model, model.encoder, model.decoder, model.extra_tokens) == ("captioner", None, None, 0)


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_recipes_set_every_option_that_matters(name: str) -> None:
    sections = tomllib.loads((EXAMPLES / f"{name}.toml").read_text(encoding="utf-8"))
    given = {key for values in sections.values() for key in values}
    assert {field.name for field in fields(TrainOptions)} - OPTIONAL <= given
    search = sections["generation"]
    token_lists = {"suppress_tokens", "begin_suppress_tokens", "bad_words_ids"}
    idle = {"seed", *token_lists} | (set() if search["do_sample"] else ONLY_SAMPLING)
    assert set(search) == {field.name for field in fields(GenerationOptions)} - idle


@pytest.mark.parametrize("name", ["demo", "flickr8k-small", "flickr8k-zh-small", "scenes-prefix", "scenes-multitask"])
def test_new_captioners_of_recipes_can_be_assembled(tmp_path: Path, name: str) -> None:
    train: TrainOptions = parsed("train", EXAMPLES / f"{name}.toml")
    model = train.model
    if isinstance(model.encoder, str):
        save_encoder(tmp_path)
        model = replace(model, encoder=str(tmp_path))
    assembled = assemble(model, lambda: CAPTIONS, train.generation, train.data.seed)
    assert assembled.max_length == model.max_length
    assert assembled.new == {"decoder"} | ({"encoder"} if isinstance(model.encoder, Mapping) else set())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where recipes look for their files; it has an encoder and photos to caption."""
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "encoder")
    paint(tmp_path / "photos", "one.png", "two.jpg", "три.webp", seed=5)
    return tmp_path


def run_recipe(
    recipe: Path, *more: object, loader: Any = transformers.VisionEncoderDecoderModel
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Prepares, trains 2 steps and captions as the recipe says; returns generation_config.json and the rows."""
    out = parsed("train", recipe).out
    prepared = call("prepare", "--config", recipe, "--workers", 0)
    assert prepared.code == 0, prepared.err
    parts = ("--encoder", "encoder", "--decoder", "decoder", "--dtype", "float32", "--device", "cpu", "--threads", 1)
    small = ("--max-steps", 2, "--evaluate-every", 2, "--save-every", 2, "--workers", 0, "--caption-images", 1)
    trained = call("train", "--config", recipe, *parts, *small)
    assert trained.code == 0, trained.err
    captioned = caption(out, *more)
    generation = json.loads(Path(out, "generation_config.json").read_text())
    given = tomllib.loads(recipe.read_text(encoding="utf-8"))["generation"]
    assert {name: generation[name] for name in given} == given
    loader.from_pretrained(out)
    return generation, captioned


def caption(model: str, *more: object) -> list[dict[str, Any]]:
    result = call("caption", "photos", "--model", model, "--device", "cpu", "--workers", 0, "--out", "-", *more)
    assert result.code == 0, result.err
    assert [row["file_name"] for row in result.rows] == ["one.png", "two.jpg", "три.webp"]
    return result.rows


def test_the_japanese_recipe_gives_five_captions_per_image(place: Path) -> None:
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
    assert rows == caption("japanese")  # sampling has a seed


def stair(names: list[str], captions: list[str] = JAPANESE) -> dict[str, Any]:
    """Annotations in the layout of STAIR Captions, five captions per image."""
    images = [{"id": number, "file_name": name} for number, name in enumerate(names, 1)]
    texts = [(image["id"], captions[(int(image["id"]) + n) % len(captions)]) for image in images for n in range(5)]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(texts)]
    return {"info": {}, "images": images, "annotations": annotations, "licenses": []}


def test_the_flickr8k_captioner_searches_with_beams_and_samples_when_asked(place: Path) -> None:
    names = [f"{number}_photo.jpg" for number in range(10)]
    paint(place / "flickr8k" / "images", *names)
    rows = [f"{name},{ENGLISH[(n + k) % len(ENGLISH)]} ." for n, name in enumerate(names) for k in range(2)]
    (place / "flickr8k" / "captions.txt").write_text("\n".join(["image,caption", *rows]) + "\n")
    save_bytes(place / "decoder")
    save_decoder(place / "decoder", vocabulary=300)
    generation, rows = run_recipe(EXAMPLES / "flickr8k.toml")
    assert generation["eos_token_id"] == generation["pad_token_id"]
    assert all("candidates" not in row for row in rows)
    sampling = ("--num-beams", 1, "--do-sample", "--top-k", 1000, "--top-p", 0.95)
    one, other = (caption("flickr8k-captioner", *sampling, "--seed", seed) for seed in (1, 2))
    assert one != other


@pytest.fixture
def served(place: Path) -> Iterator[str]:
    """The address of a server with pictures."""
    paint(place / "web", *(f"{number}.jpg" for number in range(6)), "palette.gif")
    handler = functools.partial(Quiet, directory=str(place / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


def test_the_chinese_recipe_fetches_images_and_captions_without_spaces(place: Path, served: str) -> None:
    chinese = [caption for caption in dict.fromkeys(CAPTIONS) if not caption.isascii()]
    names = [*(f"{number}.jpg" for number in range(6)), "palette.gif"]
    rows = [f"{chinese[n % len(chinese)]},{served}/{name}" for n, name in enumerate(names)]
    (place / "chinese").mkdir()
    (place / "chinese" / "pairs.csv").write_text("\n".join(["text,image_path", *rows]) + "\n", encoding="utf-8")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(chinese)))]
    (place / "decoder").mkdir()
    (place / "decoder" / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    save_decoder(place / "decoder", vocabulary=len(vocabulary))
    change_json(
        place / "decoder" / "config.json", {"bos_token_id": 50256, "eos_token_id": 50256}
    )  # as in the published config
    generation, rows = run_recipe(EXAMPLES / "chinese.toml")
    assert vocabulary[generation["eos_token_id"]] == "[SEP]"
    assert all(row["text"] for row in rows)
    assert not any(" " in row["text"] for row in rows)


@pytest.mark.parametrize("tagged", [False, True], ids=["as it is", "with its commented settings"])
def test_the_low_cost_recipe_trains_a_prefix_captioner(place: Path, tagged: bool) -> None:
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
        annotations = [{"id": n, "image_id": n % count, "caption": ENGLISH[n % len(ENGLISH)]} for n in range(2 * count)]
        write_json(place / "coco" / f"captions_{split}2017.json", {"images": images, "annotations": annotations})
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


def test_the_multitask_recipe_trains_every_task(place: Path) -> None:
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
