"""The prefix captioner: assembled, trained, frozen and unfrozen, and with tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from assembling import BERT, GPT2, VIT, new, save_bytes, write_json
from captioners import values
from families import RESNET, save_family
from running import call, change_json, paint
from training import paint_data

from capcli import Captioner, pixels
from capcli.annotations.metadata import MetadataColumn
from capcli.errors import CapcliError, UsageError
from capcli.models.prefix import cells, pooling
from capcli.options import DataOptions, ModelOptions, TrainOptions
from capcli.text import tag_text
from capcli.training.loop import freezing
from capcli.training.loop.trainer import CaptionTrainer

RESNET_TABLE = {"model_type": "resnet", **RESNET}
SMALL = ("--batch-size", 4, "--max-steps", 4, "--evaluate-every", 4, "--workers", 0, "--device", "cpu", "--threads", 1)


@pytest.mark.parametrize("count", [1, 4, 7, 10, 12, 16, 100])
@pytest.mark.parametrize("size", [(7, 7), (14, 10), (3, 5)])
def test_image_tokens_are_means_of_cells(count: int, size: tuple[int, int]) -> None:
    seen = torch.randn(2, 5, *size, dtype=torch.float64)
    expected = torch.nn.functional.adaptive_avg_pool2d(seen, cells(count, *size)).flatten(2)
    found = seen.flatten(2) @ torch.tensor(pooling(count, *size), dtype=torch.float64).T
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_ten_tokens_of_a_square_are_two_rows_of_five() -> None:
    assert cells(10, 7, 7) == (2, 5)
    assert cells(10, 14, 5) == (5, 2)
    assert cells(7, 7, 7) == (1, 7)


@pytest.mark.parametrize("encoder", [RESNET_TABLE, VIT])
def test_assembly_does_not_change_the_parts(tmp_path: Path, encoder: dict[str, Any]) -> None:
    """Encoder and GPT-2 have the weights of their folders; the projection depends on the seed."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(**encoder)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    write_json(tmp_path / "encoder" / "preprocessor_config.json", {"image_processor_type": "ConvNextImageProcessor"})
    change_json(tmp_path / "encoder" / "preprocessor_config.json", {"size": {"shortest_edge": 32}, "crop_pct": 0.875})
    save_bytes(tmp_path / "decoder")
    own = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, "vocab_size": 300}))
    own.save_pretrained(tmp_path / "decoder")
    parts = {"encoder": str(tmp_path / "encoder"), "decoder": str(tmp_path / "decoder"), "tokenizer": None}
    made, again = (new(**parts, join="prefix", image_tokens=6).model for _ in range(2))
    kept = transformers.AutoModel.from_pretrained(tmp_path / "encoder")
    for name, weight in kept.state_dict().items():
        assert torch.equal(made.encoder.state_dict()[name], weight), name
    for name, weight in own.state_dict().items():
        assert torch.equal(made.decoder.state_dict()[name], weight), name
    assert torch.equal(made.project.weight, again.project.weight)
    assert made.project.weight.std() > 0
    assert (made.config.image_tokens, made.config.tag_tokens) == (6, 0)


def test_image_and_caption_share_the_positions_of_the_decoder() -> None:
    assert new(encoder=RESNET_TABLE, decoder=GPT2, join="prefix", max_length=None).max_length == 50
    assert new(encoder=RESNET_TABLE, decoder=GPT2, join="prefix", image_tokens=40, max_length=None).max_length == 24
    with pytest.raises(
        UsageError, match="accepts 64 tokens, and 40 image tokens and 0 tag tokens leave 24: give 24 or less"
    ):
        new(encoder=RESNET_TABLE, decoder=GPT2, join="prefix", image_tokens=40, max_length=25)
    with pytest.raises(UsageError, match="leave no room for a caption"):
        new(encoder=RESNET_TABLE, decoder=GPT2, join="prefix", image_tokens=64, max_length=None)


def test_parts_that_cannot_be_joined_are_refused() -> None:
    with pytest.raises(UsageError, match="needs --join prefix or a T5 as decoder"):
        new(encoder=RESNET_TABLE, decoder=GPT2)
    with pytest.raises(UsageError, match="--join prefix takes only a gpt2 as decoder"):
        new(encoder=RESNET_TABLE, decoder=BERT, join="prefix")
    with pytest.raises(UsageError, match="--image-tokens is an option of a prefix"):
        ModelOptions(encoder="vit", decoder="gpt2", image_tokens=4)
    with pytest.raises(UsageError, match="cannot be combined with --join"):
        ModelOptions(model="it", join="prefix")
    assert ModelOptions(decoder="gpt2", join="prefix").encoder == "microsoft/resnet-101"
    data, tagged = DataOptions(data=("a.csv",)), DataOptions(data=("a.csv",), tags_column="tags")
    with pytest.raises(UsageError, match="give --join prefix too"):
        TrainOptions(tagged, ModelOptions(encoder="vit", decoder="gpt2"), "out")
    with pytest.raises(UsageError, match="give --tags-column"):
        TrainOptions(data, ModelOptions(decoder="gpt2", join="prefix", tag_tokens=4), "out")


def test_frozen_batch_norms_keep_their_statistics() -> None:
    model: Any = new(encoder=RESNET_TABLE, decoder=GPT2, join="prefix", image_tokens=4).model
    norm = next(each for each in model.encoder.modules() if isinstance(each, torch.nn.BatchNorm2d))
    pixels, ids = torch.rand(4, 3, 32, 32), torch.randint(0, 100, (4, 5))
    before = norm.running_mean.clone()
    frozen = freezing.freeze(model, "encoder")
    assert all(name.startswith("encoder.") for name in frozen.names)
    freezing.train(model)
    model(pixels, ids).logits.sum().backward()
    assert torch.equal(norm.running_mean, before)
    assert next(model.encoder.parameters()).grad is None
    assert model.project.weight.grad is not None
    freezing.unfreeze(model)
    freezing.train(model)
    model(pixels, ids).logits.sum().backward()
    assert not torch.equal(norm.running_mean, before)
    assert next(model.encoder.parameters()).grad is not None


def test_a_tokens_logits_depend_on_everything_before_it_and_nothing_after() -> None:
    """On the image, on the tags in use and on earlier tokens."""
    model: Any = new(encoder=RESNET_TABLE, decoder=GPT2, join="prefix", image_tokens=4, tag_tokens=3).model.double()
    torch.nn.init.normal_(model.project.weight)
    pixels, ids = torch.rand(1, 3, 32, 32, dtype=torch.float64), torch.tensor([[1, 7, 8, 9]])
    with torch.inference_mode():
        plain = model(pixels, ids, torch.tensor([[5, 6, -1]])).logits
        later = model(pixels, torch.tensor([[1, 7, 8, 3]]), torch.tensor([[5, 6, -1]])).logits
        others = [
            model(pixels, ids, tags).logits for tags in (None, torch.tensor([[5, 6, 7]]), torch.tensor([[6, 5, -1]]))
        ]
        dark = model(pixels * 0, ids, torch.tensor([[5, 6, -1]])).logits
    assert plain.shape[:2] == (1, 4)
    assert torch.equal(plain[:, :3], later[:, :3])
    for other in (*others, dark):
        assert (plain - other).abs().amax(-1).min() > 1e-9


def make_run(folder: Path) -> tuple[list[object], Path]:
    """Data whose tags name the colour, and the options of a run that trains on them with a new tokenizer."""
    data = paint_data(folder / "data")
    lines = Path(data).read_text().splitlines()
    tags = {
        line.split(",")[0]: word for line in lines[1:] for word in ("red", "green", "blue", "yellow") if word in line
    }
    rows = [f"{line},[{tags[line.split(',')[0]]}]" for line in lines[1:]]
    Path(data).write_text("\n".join([f"{lines[0]},tags", *rows]) + "\n")
    write_json(folder / "resnet.json", RESNET_TABLE)
    write_json(folder / "gpt2.json", GPT2)
    flags = ["--join", "prefix", "--encoder", folder / "resnet.json", "--decoder", folder / "gpt2.json"]
    return [*flags, "--tokenizer", "new", "--vocab-size", 320, "--data", data, "--val-fraction", 0.3, *SMALL], data


def test_training_with_tags_and_captioning_with_them(tmp_path: Path) -> None:
    flags, data = make_run(tmp_path)
    out = tmp_path / "out"
    tags = ("--tags-column", "tags", "--tag-tokens", 6, "--image-tokens", 4, "--num-beams", 2)
    done = call("train", *flags, *tags, "--learning-rate", 1e-2, "--out", out)
    assert done.code == 0, done.err
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["image_tokens"], config["tag_tokens"]) == ("prefix-captioner", 4, 6)
    card = (out / "README.md").read_text()
    assert 'captioner.caption(["photo.jpg"], tags=["[dog] [beach]"])' in card
    assert "VisionEncoderDecoderModel" not in card
    assert "- prefix-captioner\n" in card
    further = call(
        "train", "--model", out, "--data", data, "--tags-column", "tags", *SMALL, "--out", tmp_path / "further"
    )
    assert further.code == 0, further.err
    kept = [json.loads((each / "generation_config.json").read_text()) for each in (out, tmp_path / "further")]
    assert kept[0]["num_beams"] == kept[1]["num_beams"] == 2
    photos = paint(tmp_path / "photos", "a.png", "sub/b.png", "c.png")
    rows = [{"file_name": "a.png", "tags": "[red]"}, {"file_name": "sub/b.png", "tags": ["blue", "red"]}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    same = ("--model", out, "--out", "-", "--workers", 0, "--max-new-tokens", 6, "--fields", "width")
    plain, tagged = (call("caption", photos, *same, *more) for more in ((), ("--tags-field", "tags")))
    assert plain.code == tagged.code == 0, tagged.err
    by_name = [{row["file_name"]: row["score"] for row in done.rows} for done in (plain, tagged)]
    assert by_name[0]["c.png"] == by_name[1]["c.png"]
    assert all(by_name[0][name] != by_name[1][name] for name in ("a.png", "sub/b.png"))
    wrong = call("caption", photos, *same, "--tags-field", "words")
    assert wrong.code == 2
    assert "has no column 'words'; its columns: file_name, tags" in wrong.err


def test_tags_are_read_as_in_training(tmp_path: Path) -> None:
    """The score of a caption run is the model's, for the same pixels and the ids of the tags."""
    flags, _ = make_run(tmp_path)
    out = tmp_path / "out"
    assert call("train", *flags, "--tags-column", "tags", "--out", out).code == 0
    photos = paint(tmp_path / "photos", "a.png")
    (photos / "metadata.csv").write_text("file_name,words\na.png,[red] [dot]\n")
    same = ("--model", out, "--out", "-", "--workers", 0, "--max-new-tokens", 1, "--dtype", "float32")
    [row] = call("caption", photos, *same, "--tags-field", "words").rows
    captioner = Captioner.load(str(out), dtype="float32").core
    model = transformers.AutoModel.from_pretrained(out).eval()
    image, _ = pixels.load(str(photos / "a.png"), captioner.model.spec, max_pixels=10**8)
    ids = captioner.model.tokenizer("[red] [dot]", add_special_tokens=False)["input_ids"]
    tags = torch.tensor([[*ids, *[-1] * (16 - len(ids))]])
    start = torch.tensor([[captioner.model.generation["decoder_start_token_id"]]])
    with torch.inference_mode():
        best = model(values(image), start, tags).logits[0, -1].log_softmax(-1).max().item()
    assert row["score"] == pytest.approx(best, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["fused", "portable"])
@pytest.mark.usefixtures("shared_graphs")
def test_an_engine_reads_tags(tmp_path: Path, profile: str) -> None:
    folder, engine = save_family(tmp_path / "tagged", "tagged"), tmp_path / "engine"
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(4)))
    rows = [{"file_name": f"{n}.png", "tags": " ".join(f"word{9 + n + k}" for k in range(n))} for n in range(4)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    done = call("export", "--onnx", "--model", folder, "--out", engine, "--profile", profile, "--device", "cpu")
    assert done.code == 0, done.err
    same = ("--out", "-", "--max-new-tokens", 8, "--dtype", "float32", "--workers", 0)
    for search in (
        (),
        ("--num-beams", 3, "--tags-field", "tags"),
        ("--tags-field", "tags", "--prompt", "word9 word11"),
    ):
        found, expected = (call("caption", photos, "--model", model, *same, *search) for model in (engine, folder))
        assert found.code == expected.code == 0, found.err
        assert [row["text"] for row in found.rows] == [row["text"] for row in expected.rows]
    planned = call("export", "--trt", "--model", folder, "--out", tmp_path / "plans")
    assert planned.code == 1
    assert "also reads tags" in planned.err


def test_tags_come_from_the_nearest_metadata_file_with_the_image(tmp_path: Path) -> None:
    below = tmp_path / "all" / "some"
    below.mkdir(parents=True)
    (below / "metadata.csv").write_text("file_name,tags\na.png,near\nempty.png,\n")
    (tmp_path / "all" / "metadata.jsonl").write_text(
        '{"file_name": "some/a.png", "tags": "far"}\n{"file_name": "some/b.png", "tags": ["far", "off"]}\n'
    )
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "all/some/c.png", "text": "of something else"}\n')
    tags = MetadataColumn("tags")
    assert [tags.of(str(below / f"{name}.png")) for name in ("a", "b", "c", "empty")] == ["near", "[far] [off]", "", ""]
    assert tags.found == 2
    with pytest.raises(UsageError, match="has no column 'tags'; its columns: file_name, text"):
        MetadataColumn("tags").of(str(tmp_path / "a.png"))


def test_tags_are_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_family(tmp_path / "tagged", "tagged")
    photos = paint(tmp_path / "photos", "sub/a.png")
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "sub/a.png", "tags": "word9 word11"}))
    (photos / "sub" / "names.txt").write_text("a.png\n")
    same = ("--model", folder, "--out", "-", "--workers", 0, "--max-new-tokens", 4, "--dtype", "float32")
    tagged = (*same, "--tags-field", "tags")
    plain, *scores = (call("caption", photos, *flags).rows[0]["score"] for flags in (same, tagged))
    monkeypatch.chdir(photos / "sub")
    for given in ((".",), ("a.png",), ("--from-file", "names.txt")):
        [row] = call("caption", *given, *tagged).rows
        scores.append(row["score"])
    assert plain not in scores
    assert len(scores) == 4
    assert len(set(scores)) == 1


def test_tags_for_a_list_of_images(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "tagged", "tagged")
    photos = paint(tmp_path / "photos", "a.png", "b.png", "c.png")
    rows = [{"file_name": "a.png", "tags": ["word9", "word11"]}, {"file_name": "c.png", "tags": "word12"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    same = ("--model", folder, "--out", "-", "--workers", 0, "--dtype", "float32", "--max-new-tokens", 6)
    scores = {row["file_name"]: row["score"] for row in call("caption", photos, *same, "--tags-field", "tags").rows}
    captioner, names = Captioner.load(str(folder), dtype="float32"), ("a.png", "b.png", "c.png")
    images = [str(photos / name) for name in names]
    found = list(captioner.caption(images, tags=["[word9] [word11]", None, "word12"], max_new_tokens=6))
    assert [each.score for each in found] == pytest.approx([scores[name] for name in names], abs=1e-4)
    plain = [each.score for each in captioner.caption(images, max_new_tokens=6)]
    assert [mine == other for mine, other in zip(plain, [each.score for each in found], strict=True)] == [0, 1, 0]
    with pytest.raises(UsageError, match="2 tags and 3 images"):
        captioner.caption(images, tags=["[dog]", None])
    with pytest.raises(UsageError, match="not UTF-8"):
        captioner.caption(images[:1], tags=["\udcff"])
    for wrong, given in (("[dog]", images), ([["dog"]], images[:1]), (["[dog]"], iter(images[:1]))):
        with pytest.raises(TypeError, match="tags"):
            captioner.caption(given, tags=wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="reads no tags"):
        Captioner.load(str(save_family(tmp_path / "git", "git"))).caption(images, tags=[None] * 3)


def test_a_model_without_tags_refuses_them(tmp_path: Path) -> None:
    """Before its weights are read, which are damaged here."""
    folder, photos = save_family(tmp_path / "git", "git"), paint(tmp_path / "photos", "a.png")
    (folder / "model.safetensors").write_bytes(b"nothing")
    refused = call("caption", photos, "--model", folder, "--out", "-", "--tags-field", "tags")
    assert refused.code == 2
    assert "reads no tags" in refused.err
    flags, data = make_run(tmp_path)
    trained = call(
        "train", "--model", folder, "--data", data, "--tags-column", "tags", *SMALL, "--out", tmp_path / "it"
    )
    assert trained.code == 2
    assert "reads no tags" in trained.err
    cramped = call("train", *flags, "--tags-column", "tags", "--tag-tokens", 0, "--out", tmp_path / "it")
    assert cramped.code == 2
    assert "no room for tags" in cramped.err
    assert not (tmp_path / "it").exists()


def test_tags_of_prepared_data(tmp_path: Path) -> None:
    flags, data = make_run(tmp_path)
    prepared = tmp_path / "prepared"
    done = call(
        "prepare", "--data", data, "--tags-column", "tags", "--out", prepared, "--workers", 0, "--val-fraction", 0.3
    )
    assert done.code == 0, done.err
    flags[flags.index("--data") + 1] = prepared
    del flags[flags.index("--val-fraction") : flags.index("--val-fraction") + 2]
    trained = call("train", *flags, "--tags-column", "tags", "--out", tmp_path / "out")
    assert trained.code == 0, trained.err
    without = call("train", *flags, "--tags-column", "words", "--out", tmp_path / "other")
    assert without.code == 2
    assert "no column 'words'" in without.err


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ("[dog] [bark]", "[dog] [bark]"),
        (["dog", "bark"], "[dog] [bark]"),
        ('["dog", "big bark"]', "[dog] [big bark]"),
        ('["dog"]', "[dog]"),
        ("dog, bark\n", "dog, bark"),
        ([], ""),
        (None, ""),
        (float("nan"), ""),
        (["", None, "dog"], "[dog]"),
    ],
)
def test_tags_become_one_text(held: object, text: str) -> None:
    assert tag_text(held) == text


@pytest.mark.parametrize("name", ["rows.jsonl", "coco.json", "karpathy.json", "rows.parquet", "captions.token"])
def test_tags_of_every_format_with_columns(tmp_path: Path, name: str) -> None:
    from capcli.annotations import read_split

    paint(tmp_path, "a.png", "b.png")
    row = {"file_name": "a.png", "caption": "a dog", "tags": ["dog"]}
    rows = [row, {"file_name": "b.png", "caption": "a cat", "tags": None}]
    path = tmp_path / name
    if name == "rows.parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)
    elif name == "captions.token":
        path.write_text("a.png#0\ta dog\nb.png#0\ta cat\n")
    elif name == "rows.jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif name == "coco.json":
        images = [{"id": n, "file_name": each["file_name"], "tags": each["tags"]} for n, each in enumerate(rows)]
        captions = [{"id": n, "image_id": n, "caption": each["caption"]} for n, each in enumerate(rows)]
        write_json(path, {"images": images, "annotations": captions})
    else:
        images = [
            {"filename": each["file_name"], "tags": each["tags"], "sentences": [{"raw": each["caption"]}]}
            for each in rows
        ]
        write_json(path, {"images": images})
    options = DataOptions(data=(str(path),), tags_column="tags")
    if name == "captions.token":
        with pytest.raises(UsageError, match="no image has tags in a column 'tags'"):
            read_split(options)
        return
    assert [(each.name, each.tags) for each in read_split(options).train] == [("a.png", "[dog]"), ("b.png", "")]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Resumed before the encoder is unfrozen, with the statistics of its batch norms."""
    flags, _ = make_run(tmp_path)
    flags += ["--tags-column", "tags", "--freeze", "encoder", "--unfreeze-after", 3, "--save-every", 1]
    save = CaptionTrainer._save_checkpoint  # noqa: SLF001

    def break_after_two(trainer: CaptionTrainer, *given: Any) -> None:
        save(trainer, *given)
        if trainer.state.global_step == 2:
            raise CapcliError("broken")

    assert call("train", *flags, "--out", tmp_path / "whole").code == 0
    with mock.patch.object(CaptionTrainer, "_save_checkpoint", break_after_two):
        assert call("train", *flags, "--out", tmp_path / "broken").code == 1
    gone_on = call("train", "--out", tmp_path / "broken", "--resume")
    assert gone_on.code == 0, gone_on.err
    assert "resuming from checkpoint-2" in gone_on.err
    whole, parts = (transformers.AutoModel.from_pretrained(tmp_path / out).state_dict() for out in ("whole", "broken"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())
    assert any("running_mean" in name and weight.abs().max() > 0 for name, weight in whole.items())
