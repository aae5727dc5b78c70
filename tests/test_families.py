"""Every family says what transformers' `generate()` says; its folder captions through the command, and its engine too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from captioners import SIZE, captions, encoder_config, pictures
from families import (
    FAMILIES,
    RESNET,
    TAGS,
    asks,
    encoder_ids,
    make_end,
    prefix,
    prompted,
    random_of_family,
    random_weights,
    save_family,
    vision_t5,
)
from oracle import Case, agrees, matches, truth
from PIL import Image
from running import call, change_json, paint
from transformers import ResNetConfig

from capcli.decoding.settings import NO_TOKEN
from capcli.decoding.shapes import Shapes
from capcli.engine.engine_json import read_engine
from capcli.export.lint import duplicate_weights
from capcli.export.origin import plans_refused
from capcli.models.families import FILES

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")
families = pytest.mark.parametrize("family", FAMILIES)
SEARCHES: dict[str, Case] = {
    "greedy": Case(),
    "beams": Case({"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0}),
    "constraints": Case({"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 3}),
    "sampling": Case({"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 1.3}),
    "sampled beams": Case(  # which generate() cannot draw where an end is forced
        {"do_sample": True, "num_beams": 5, "num_return_sequences": 5}, {"forced_eos_token_id": None}
    ),
    "prompt": Case(prompt=(7, 9, 11)),
    "prompt, beams": Case({"num_beams": 3}, prompt=(7, 9)),
}


@families
@pytest.mark.parametrize("search", SEARCHES)
def test_a_family_says_what_generate_says(family: str, search: str) -> None:
    """Nine images in four slots: some leave early and others take their seats; then one alone."""
    model, case = random_of_family(family), SEARCHES[search]
    case = replace(case, given={"max_new_tokens": 12, **case.given})
    lengths = agrees(model, pictures(9), case, keys=list(range(9)), lag=1)
    assert len(lengths) >= 2, f"captions of {lengths} tokens prove little"
    agrees(model, pictures(2), case, Shapes(1, 1))


@families
def test_a_family_says_the_same_in_loops_beside_each_other(family: str) -> None:
    model = random_of_family(family)
    case = Case({"num_beams": 2, "max_new_tokens": 8})
    asked, images = case.settings(model), pictures(30)
    assert captions(model, images, asked, Shapes(3, 2, loops=3)) == captions(model, images, asked, Shapes(3, 2))


@pytest.mark.parametrize("search", ["greedy", "beams", "prompt"])
def test_tags_are_of_each_image(search: str) -> None:
    """Some have four, some none, and the empty places are hidden; what is said hangs on them."""
    model, case = random_of_family("tagged"), SEARCHES[search]
    case = replace(case, given={"max_new_tokens": 12, **case.given})
    tags = [(*range(n, n + n % 5), *(NO_TOKEN,) * (TAGS - n % 5)) for n in range(9)]
    same = [pictures(1)[0]] * 9
    agrees(model, same, case, lag=1, tags=tags)
    said = {h[0].tokens for h in captions(model, same, case.settings(model), encoder_ids=tags)}
    assert len(said) > 1


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_questions_are_of_each_image(search: str) -> None:
    model, case = random_of_family("vision-t5"), SEARCHES[search]
    case = replace(case, given={"max_new_tokens": 12, **case.given})
    same, prompts = pictures(1)[0], [(n, 3 * n + 2, 7) for n in range(9)]
    ids = [encoder_ids(model, prompt) for prompt in prompts]
    found = captions(model, [same] * 9, case.settings(model), lag=1, encoder_ids=ids)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        matches(hypotheses, truth(model, same, replace(case, prompt=prompt)))
    assert len({h[0].tokens for h in found}) > 1


@pytest.mark.parametrize(("kind", "rows", "first"), [("vit", 4, 1), ("deit", 4, 2), ("swinv2", 4, 0), ("resnet", 2, 0)])
def test_image_tokens_say_where_they_stand(kind: str, rows: int, first: int) -> None:
    seeing = ResNetConfig(**RESNET) if kind == "resnet" else encoder_config(kind)
    model, given = vision_t5(seeing), []
    torch.nn.init.zeros_(model.image_projection.weight)
    model.text_model.encoder.register_forward_pre_hook(lambda *call: given.append(call[2]), with_kwargs=True)
    model.read(torch.zeros(1, 3, SIZE, SIZE), torch.tensor([[5]]))
    image = given[0]["inputs_embeds"][0, :-1]
    assert len(image) == first + rows * rows
    assert not image[:first].any()
    grid = image[first:].view(rows, rows, -1)
    column, row = grid.split(24, 2)
    assert all(torch.equal(column[0], each) for each in column)
    assert all(torch.equal(row[:, 0], each) for each in row.unbind(1))
    assert len({tuple(place.tolist()) for place in image[first:]}) == rows * rows


@pytest.mark.parametrize("kind", ["vit", "deit", "beit", "swin", "resnet"])
def test_a_t5_reads_any_encoder(kind: str) -> None:
    seeing = ResNetConfig(**RESNET) if kind == "resnet" else encoder_config(kind)
    model = random_weights(vision_t5(seeing))
    make_end(model, 0.2)
    agrees(model, pictures(5), Case({"max_new_tokens": 12}))


@pytest.mark.parametrize("kind", ["vit", "deit", "beit", "swin", "swinv2"])
def test_a_prefix_comes_from_any_encoder(kind: str) -> None:
    model = random_weights(prefix(encoder_config(kind)))
    make_end(model, 0.2)
    agrees(model, pictures(5), Case({"max_new_tokens": 12}))


@families
def test_a_folder_captions_as_plain_transformers_does(tmp_path: Path, family: str) -> None:
    folder = save_family(tmp_path / family, family)
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(5)))
    flags = ("--dtype", "float32", "--max-new-tokens", 10)
    asked = ("--prompt", "word9 word11") if asks(random_of_family(family)) else ()
    told = call("caption", photos, "--model", folder, "-o", "-", "--num-beams", 2, *asked, *flags)
    assert told.code == 0, told.err
    model = type(random_of_family(family)).from_pretrained(folder).eval()
    given = prompted(model, (9, 11) if asked else ())
    tokenizer, processor = (
        each.from_pretrained(folder) for each in (transformers.AutoTokenizer, transformers.AutoImageProcessor)
    )
    for row in told.rows:
        pixels = processor(Image.open(photos / row["file_name"]).convert("RGB"), return_tensors="pt").pixel_values
        with torch.inference_mode():
            ids = model.generate(pixel_values=pixels, num_beams=2, max_new_tokens=10, **given)[0]
        assert row["text"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len({row["text"] for row in told.rows}) > 1


# Each in both profiles: the T5s are one family, and the tagged are in test_prefix.py, whose engines read tags.
@pytest.mark.parametrize(
    ("family", "profile"),
    [
        *((family, profile) for family in ("blip", "git", "florence2", "prefix") for profile in ("fused", "portable")),
        *(("vision-t5", "fused"), ("vision-t5 v1.1", "portable")),
    ],
)
def test_an_engine_says_the_same(tmp_path: Path, family: str, profile: str) -> None:
    folder, engine = save_family(tmp_path / family, family), tmp_path / "engine"
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(5)))
    done = call("export", "--onnx", "--model", folder, "--out", engine, "--profile", profile, "--device", "cpu")
    assert done.code == 0, done.err
    for search in ((), ("--num-beams", 3), ("--prompt", "word9 word11")):
        ours, theirs = (
            call("caption", photos, "--model", name, "-o", "-", "--max-new-tokens", 8, "--dtype", "float32", *search)
            for name in (engine, folder)
        )
        assert ours.code == theirs.code == 0, ours.err
        assert [row["text"] for row in ours.rows] == [row["text"] for row in theirs.rows]


@pytest.mark.parametrize(
    ("family", "tables"),  # of the vocabulary: one where what chooses words is the embedding
    [("florence2", 1), ("vision-t5", 1), ("vision-t5 v1.1", 2)],
)
def test_in_int8_what_chooses_words_stays_float32_and_is_stored_once(tmp_path: Path, family: str, tables: int) -> None:
    folder, engine = save_family(tmp_path / family, family), tmp_path / "engine"
    flags = ("--quantize", "int8", "--profile", "portable", "--device", "cpu", "--force")
    done = call("export", "--onnx", "--model", folder, "--out", engine, *flags)
    assert done.code == 0, done.err
    model, vocabulary = onnx.load(str(engine / "step.onnx")), read_engine(str(engine)).vocabulary
    coarse = [
        {each.name: each.i for each in node.attribute} for node in model.graph.node if node.op_type == "MatMulNBits"
    ]
    assert coarse
    assert not any(each["N"] == vocabulary or each["N"] < each["K"] for each in coarse)
    assert duplicate_weights(model) == []
    kept = [each.data_type for each in model.graph.initializer if len(each.dims) == 2 and vocabulary in each.dims]
    assert kept == [onnx.TensorProto.FLOAT] * tables


def test_the_readme_lists_every_family() -> None:
    table = README.read_text("utf-8").partition("<!-- families -->")[2].partition("\n\n")[0]
    rows = {row.split("|")[1].strip(" `"): row.split("|")[3:7] for row in table.splitlines()[3:]}
    assert rows.keys() == FILES.keys()
    for captions_in, trains, exports, _ in rows.values():
        assert {captions_in.strip(), trains.strip(), exports.strip()} == {"yes"}
    configs = [
        {"model_type": "vision-encoder-decoder"},
        *(random_of_family(name).config.to_dict() for name in FAMILIES),
    ]
    for config in configs:
        tensorrt, _, tagged = rows[config["model_type"]][3].partition("with tags:")
        shown = tagged if config.get("tag_tokens") else tensorrt
        assert shown.strip().startswith("no") == (plans_refused(config) is not None), config["model_type"]


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    done = call("export", "--trt", "--model", save_family(tmp_path / "it", "florence2"), "--out", tmp_path / "engine")
    assert done.code == 1
    assert "cannot become TensorRT plans: they have one shape" in done.err
    assert not (tmp_path / "engine").exists()


def test_what_a_question_cannot_be_is_told(tmp_path: Path) -> None:
    folder, photos = save_family(tmp_path / "it", "florence2"), paint(tmp_path / "photos", "a.png")
    kept = call("caption", photos, "--model", folder, "-o", "-", "--prompt", "<CAPTION>", "--keep-prompt")
    assert kept.code == 0
    assert "--keep-prompt has no effect" in kept.err
    (folder / "model.safetensors").write_bytes(b"nothing")  # nobody reads it
    done = call("caption", photos, "--model", folder, "-o", "-", "--prompt", "<OD>")
    assert done.code == 2
    assert "<OD> is no task that captions" in done.err


def test_a_checkpoint_with_code_of_its_own_is_told_where_its_weights_are(tmp_path: Path) -> None:
    folder, photos = save_family(tmp_path / "it", "florence2"), paint(tmp_path / "photos", "a.png")
    change_json(folder / "config.json", {"auto_map": {"AutoConfig": "configuration_florence2.Florence2Config"}})
    done = call("caption", photos, "--model", folder, "-o", "-")
    assert done.code == 1
    assert "brings its own code, which capcli never runs. florence-community has the same weights" in done.err
