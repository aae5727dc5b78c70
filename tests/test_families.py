"""Every family gives the captions of transformers' `generate()`, in the loop, through the command and as an engine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from captioners import SIZE, captions, encoder_config, pictures
from exporting import cached_graphs, duplicate_weights
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


@pytest.fixture(scope="module", autouse=True)
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cached_graphs(tmp_path_factory):
        yield


@families
@pytest.mark.parametrize("search", SEARCHES)
def test_captions_equal_those_of_generate(family: str, search: str) -> None:
    """Nine images in four slots, so that slots are freed and used again; then one slot."""
    model, case = random_of_family(family), SEARCHES[search]
    case = replace(case, given={"max_new_tokens": 12, **case.given})
    lengths = agrees(model, pictures(9), case, keys=list(range(9)), lag=1)
    assert len(lengths) >= 2, f"all captions have {lengths} tokens: too easy a test"
    agrees(model, pictures(2), case, Shapes(1, 1))


@families
def test_parallel_loops_give_the_same_captions(family: str) -> None:
    model = random_of_family(family)
    case = Case({"num_beams": 2, "max_new_tokens": 8})
    settings, images = case.settings(model), pictures(30)
    alone = captions(model, images, settings, Shapes(3, 2))
    assert captions(model, images, settings, Shapes(3, 2, loops=3)) == alone


@pytest.mark.parametrize("search", ["greedy", "beams", "prompt"])
def test_each_image_has_its_own_tags(search: str) -> None:
    """From no tags to four; unused places are hidden, and the captions depend on the tags."""
    model, case = random_of_family("tagged"), SEARCHES[search]
    case = replace(case, given={"max_new_tokens": 12, **case.given})
    tags = [(*range(n, n + n % 5), *(NO_TOKEN,) * (TAGS - n % 5)) for n in range(9)]
    same = [pictures(1)[0]] * 9
    agrees(model, same, case, lag=1, tags=tags)
    found = {h[0].tokens for h in captions(model, same, case.settings(model), encoder_ids=tags)}
    assert len(found) > 1


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_each_image_has_its_own_question(search: str) -> None:
    model, case = random_of_family("vision-t5"), SEARCHES[search]
    case = replace(case, given={"max_new_tokens": 12, **case.given})
    same, prompts = pictures(1)[0], [(n, 3 * n + 2, 7) for n in range(9)]
    ids = [encoder_ids(model, prompt) for prompt in prompts]
    found = captions(model, [same] * 9, case.settings(model), lag=1, encoder_ids=ids)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        matches(hypotheses, truth(model, same, replace(case, prompt=prompt)))
    assert len({h[0].tokens for h in found}) > 1


@pytest.mark.parametrize(("kind", "rows", "first"), [("vit", 4, 1), ("deit", 4, 2), ("swinv2", 4, 0), ("resnet", 2, 0)])
def test_image_tokens_carry_their_row_and_column(kind: str, rows: int, first: int) -> None:
    encoder = ResNetConfig(**RESNET) if kind == "resnet" else encoder_config(kind)
    model, calls = vision_t5(encoder), []
    torch.nn.init.zeros_(model.image_projection.weight)
    model.text_model.encoder.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    model.read(torch.zeros(1, 3, SIZE, SIZE), torch.tensor([[5]]))
    image = calls[0]["inputs_embeds"][0, :-1]
    assert len(image) == first + rows * rows
    assert not image[:first].any()
    grid = image[first:].view(rows, rows, -1)
    column, row = grid.split(24, 2)
    assert all(torch.equal(column[0], other) for other in column)
    assert all(torch.equal(row[:, 0], other) for other in row.unbind(1))
    assert len({tuple(token.tolist()) for token in image[first:]}) == rows * rows


@pytest.mark.parametrize("kind", ["vit", "deit", "beit", "swin", "resnet", "siglip_vision_model", "dinov2"])
def test_a_t5_with_every_encoder(kind: str) -> None:
    encoder = ResNetConfig(**RESNET) if kind == "resnet" else encoder_config(kind)
    model = random_weights(vision_t5(encoder))
    make_end(model, 0.2)
    agrees(model, pictures(5), Case({"max_new_tokens": 12}))


@pytest.mark.parametrize(
    "kind",
    ["vit", "deit", "beit", "swin", "swinv2", "donut-swin", "clip_vision_model", "dinov2_with_registers"],
)
def test_a_prefix_captioner_with_every_encoder(kind: str) -> None:
    model = random_weights(prefix(encoder_config(kind)))
    make_end(model, 0.2)
    agrees(model, pictures(5), Case({"max_new_tokens": 12}))


@families
def test_the_command_captions_as_transformers_does(tmp_path: Path, family: str) -> None:
    folder = save_family(tmp_path / family, family)
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(5)))
    flags = ("--dtype", "float32", "--max-new-tokens", 10, "--workers", 0)
    prompt = ("--prompt", "word9 word11") if asks(random_of_family(family)) else ()
    done = call("caption", photos, "--model", folder, "-o", "-", "--num-beams", 2, *prompt, *flags)
    assert done.code == 0, done.err
    model = type(random_of_family(family)).from_pretrained(folder).eval()
    given = prompted(model, (9, 11) if prompt else ())
    tokenizer, processor = (
        kind.from_pretrained(folder) for kind in (transformers.AutoTokenizer, transformers.AutoImageProcessor)
    )
    for row in done.rows:
        pixels = processor(Image.open(photos / row["file_name"]).convert("RGB"), return_tensors="pt").pixel_values
        with torch.inference_mode():
            ids = model.generate(pixel_values=pixels, num_beams=2, max_new_tokens=10, **given)[0]
        assert row["text"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len({row["text"] for row in done.rows}) > 1


# Every family in both profiles; the two T5s share one family, and tagged captioners are in test_prefix.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "profile"),
    [
        *((family, profile) for family in ("blip", "git", "florence2", "prefix") for profile in ("fused", "portable")),
        *(("vision-t5", "fused"), ("vision-t5 v1.1", "portable")),
    ],
)
@pytest.mark.usefixtures("shared_graphs")
def test_an_engine_gives_the_same_captions(tmp_path: Path, family: str, profile: str) -> None:
    folder, engine = save_family(tmp_path / family, family), tmp_path / "engine"
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(5)))
    done = call("export", "--onnx", "--model", folder, "--out", engine, "--profile", profile, "--device", "cpu")
    assert done.code == 0, done.err
    for search in ((), ("--num-beams", 3), ("--prompt", "word9 word11")):
        flags = ("-o", "-", "--max-new-tokens", 8, "--dtype", "float32", "--workers", 0, *search)
        found, expected = (call("caption", photos, "--model", model, *flags) for model in (engine, folder))
        assert found.code == expected.code == 0, found.err
        assert [row["text"] for row in found.rows] == [row["text"] for row in expected.rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tables"),  # matrices of the vocabulary's size: one where the output layer is the embedding
    [("florence2", 1), ("vision-t5", 1), ("vision-t5 v1.1", 2)],
)
@pytest.mark.usefixtures("shared_graphs")
def test_in_int8_the_output_layer_stays_float32_and_is_stored_once(tmp_path: Path, family: str, tables: int) -> None:
    folder, engine = save_family(tmp_path / family, family), tmp_path / "engine"
    flags = ("--quantize", "int8", "--profile", "portable", "--device", "cpu", "--force")
    done = call("export", "--onnx", "--model", folder, "--out", engine, *flags)
    assert done.code == 0, done.err
    model, vocabulary = onnx.load(str(engine / "step.onnx")), read_engine(str(engine)).vocabulary
    sizes = [
        {field.name: field.i for field in node.attribute} for node in model.graph.node if node.op_type == "MatMulNBits"
    ]
    assert sizes
    assert not any(size["N"] == vocabulary or size["N"] < size["K"] for size in sizes)
    assert duplicate_weights(model) == []
    found = [
        weight.data_type for weight in model.graph.initializer if len(weight.dims) == 2 and vocabulary in weight.dims
    ]
    assert found == [onnx.TensorProto.FLOAT] * tables


def test_the_readme_lists_every_family() -> None:
    table = README.read_text("utf-8").partition("| `model_type` |")[2].partition("\n\n")[0]
    rows: dict[str, str] = {}  # what stands under TensorRT
    for row in table.splitlines()[2:]:
        names, *cells = (cell.strip() for cell in row.split("|")[1:-1])
        rows |= dict.fromkeys(re.findall(r"`([\w.-]+)`", names), cells[-1])
    assert rows.keys() >= FILES.keys()
    configs = [
        {"model_type": "vision-encoder-decoder"},
        *(random_of_family(name).config.to_dict() for name in FAMILIES),
    ]
    for config in configs:
        tensorrt = rows[config["model_type"]]
        refused = tensorrt == "no" or (tensorrt == "without tags" and bool(config.get("tag_tokens")))
        assert refused == (plans_refused(config) is not None), config["model_type"]


def test_an_impossible_export_names_the_reason(tmp_path: Path) -> None:
    done = call("export", "--trt", "--model", save_family(tmp_path / "it", "florence2"), "--out", tmp_path / "engine")
    assert done.code == 1
    assert "cannot become TensorRT plans: plans have fixed shapes" in done.err
    assert not (tmp_path / "engine").exists()


def test_a_prompt_that_is_not_a_captioning_task_is_refused(tmp_path: Path) -> None:
    folder, photos = save_family(tmp_path / "it", "florence2"), paint(tmp_path / "photos", "a.png")
    kept = call(
        "caption", photos, "--model", folder, "-o", "-", "--prompt", "<CAPTION>", "--keep-prompt", "--workers", 0
    )
    assert kept.code == 0
    assert "--keep-prompt has no effect" in kept.err
    (folder / "model.safetensors").write_bytes(b"nothing")  # it is not read
    done = call("caption", photos, "--model", folder, "-o", "-", "--prompt", "<OD>")
    assert done.code == 2
    assert "<OD> is not a captioning task" in done.err


def test_a_checkpoint_with_remote_code_is_refused_and_another_named(tmp_path: Path) -> None:
    folder, photos = save_family(tmp_path / "it", "florence2"), paint(tmp_path / "photos", "a.png")
    change_json(folder / "config.json", {"auto_map": {"AutoConfig": "configuration_florence2.Florence2Config"}})
    done = call("caption", photos, "--model", folder, "-o", "-")
    assert done.code == 1
    assert "needs its own code, which capcli never runs. florence-community has the same weights" in done.err
