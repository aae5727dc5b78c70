"""VisionEncoderDecoder checkpoints of every kind, TrOCR and Donut among them: `capcli caption`, `train` and `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from assembling import save_decoder, save_encoder, save_pieces
from captioners import SIZE, pictures, random_captioner
from oracle import Case, agrees
from PIL import Image
from running import VOCABULARY, call, change_json, paint, save_captioner
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

from capcli import Caption, Captioner
from capcli.errors import UsageError
from capcli.loading.gpu_jpeg import refuse_gpu_decode
from capcli.models.checkpoint import load_tokenizer
from capcli.models.model_files import ModelFiles
from capcli.pixels import PixelSpec
from capcli.training.model.tokenizers import read_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")
DECODERS = ("roberta", "bart", "mbart", "trocr", "trocr, sinusoids")
START, END = VOCABULARY - 2, VOCABULARY - 1
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CROP = {"size": {"shortest_edge": SIZE + 4}, "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}}
# Checkpoints as people have them: encoder, decoder, and the image processor's settings.
CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT and RoBERTa": ("vit", "roberta", {}),
    "ViT and BART": ("vit", "bart", {}),
    "CLIP and GPT-2": ("clip_vision_model", "gpt2", {"image_processor_type": "CLIPImageProcessor", **CROP}),
    "SigLIP and GPT-2": ("siglip_vision_model", "gpt2", {"image_processor_type": "SiglipImageProcessor"}),
    "DINOv2 and GPT-2": ("dinov2", "gpt2", {"image_processor_type": "BitImageProcessor", **IMAGENET, **CROP}),
    "TrOCR": ("deit", "trocr", {"image_processor_type": "DeiTImageProcessor", "do_center_crop": False}),
    "Donut": ("donut-swin", "mbart", {"image_processor_type": "DonutImageProcessor", "size": [48, 64]}),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("search", [{}, {"num_beams": 4, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_slots_are_used_again_and_prompts_are_read(decoder: str, search: dict[str, Any]) -> None:
    model = random_captioner("vit", decoder, seed=3, ends=0.35, dtype=torch.float64)
    for prompt in ((), (START, 9, 11)):
        case = Case({"max_new_tokens": 12, **search}, prompt=prompt)
        lengths = agrees(model, pictures(7), case, lag=1)
        assert len(lengths) >= 2, f"all captions have {lengths} tokens: too easy a test"


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_command_and_api_caption_as_transformers_does(tmp_path: Path, kind: str) -> None:
    encoder, decoder, processor = CHECKPOINTS[kind]
    folder = save_captioner(tmp_path / "model", encoder=encoder, decoder=decoder, seed=1, processor=processor)
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(6)))
    flags = ("--dtype", "float32", "--batch-size", 3, "--workers", 0)
    done = call("caption", photos, "--model", folder, "-o", "-", *flags)
    assert done.code == 0, done.err
    assert {row["file_name"]: row["text"] for row in done.rows} == generated(folder, photos)
    paths = [photos / row["file_name"] for row in done.rows]
    results = Captioner.load(str(folder), dtype="float32").caption(paths, num_beams=4)
    texts = {Path(result.name).name: result.text for result in results if isinstance(result, Caption)}
    assert texts == generated(folder, photos, num_beams=4)
    assert len({*texts.values()}) > 1


def generated(folder: Path, photos: Path, **search: Any) -> dict[str, str]:
    """The captions of transformers' generate(), one image at a time."""
    model: Any = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    found = {}
    for photo in sorted(photos.iterdir()):
        pixels = processor(Image.open(photo).convert("RGB"), return_tensors="pt").pixel_values
        with torch.inference_mode():
            found[photo.name] = tokenizer.decode(model.generate(pixels, **search)[0], skip_special_tokens=True).strip()
    return found


def test_sinusoids_survive_loading(tmp_path: Path) -> None:
    """transformers leaves them without values, so the reference is the model that was saved."""
    shape: dict[str, Any] = {"encoder": "deit", "decoder": "trocr, sinusoids", "seed": 1}
    folder = save_captioner(tmp_path / "model", **shape)
    saved, photos = random_captioner(vocabulary=VOCABULARY, **shape), paint(tmp_path / "photos", "a.png", "b.png")
    done = call("caption", photos, "--model", folder, "-o", "-", "--dtype", "float32", "--workers", 0)
    assert done.code == 0, done.err
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    for row in done.rows:
        pixels = processor(Image.open(photos / row["file_name"]).convert("RGB"), return_tensors="pt").pixel_values
        ids = saved.generate(pixels, max_new_tokens=12)[0]
        assert row["text"] == tokenizer.decode(ids, skip_special_tokens=True).strip()


FIELDS = ["<s_cord>", "<s_menu>", "</s_menu>", "<s_name>", "</s_name>", "<sep/>", "<paid/>"]


@pytest.fixture
def donut(tmp_path: Path) -> Path:
    """A random Donut with field tokens, in a folder as DonutProcessor saves it."""
    folder = save_captioner(tmp_path / "donut", encoder="donut-swin", decoder="mbart", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = json.loads((folder / "tokenizer.json").read_text())
    for number, name in enumerate(FIELDS):  # in place of words
        backend["model"]["vocab"][name] = backend["model"]["vocab"].pop(f"word{20 + number}")
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": FIELDS})
    assert len(tokenizer) == VOCABULARY
    image_processor = transformers.DonutImageProcessor(size={"height": SIZE, "width": SIZE})
    (folder / "preprocessor_config.json").unlink()
    transformers.DonutProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    assert "image_processor" in json.loads((folder / "processor_config.json").read_text())
    return folder


def test_donut_answers_its_task_prompt_in_json(tmp_path: Path, donut: Path) -> None:
    """The prompt takes the place of the start token, and what it opens belongs to the JSON."""
    change_json(donut / "generation_config.json", {"forced_eos_token_id": 20 + FIELDS.index("</s_menu>")})
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(5)))
    prompt = "<s_cord><s_name> word30 </s_name><s_menu>"
    flags = ("--dtype", "float32", "--workers", 0, "--num-beams", 2, "--max-new-tokens", 4)
    done = call("caption", photos, "--model", donut, "-o", "-", "--prompt", prompt, *flags)
    assert done.code == 0, done.err
    model: Any = VisionEncoderDecoderModel.from_pretrained(donut).eval()
    processor: Any = transformers.DonutProcessor.from_pretrained(donut)
    given = processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    for row in done.rows:
        pixels = processor(Image.open(photos / row["file_name"]).convert("RGB"), return_tensors="pt").pixel_values
        ids = model.generate(pixels, decoder_input_ids=given, num_beams=2, max_new_tokens=4)[0]
        text = processor.tokenizer.decode(ids).replace("<end>", "").replace("<pad>", "").replace("<s_cord>", "", 1)
        assert json.loads(row["text"]) == processor.token2json(text.strip())
        assert json.loads(row["text"])["name"] == "word30"
    assert len({row["text"] for row in done.rows}) > 1


def test_donut_without_fields_gives_plain_text(tmp_path: Path, donut: Path) -> None:
    no_fields = {"suppress_tokens": list(range(20, 20 + len(FIELDS)))}
    change_json(donut / "generation_config.json", no_fields)
    photos = paint(tmp_path / "photos", "a.png")
    done = call("caption", photos, "--model", donut, "-o", "-", "--dtype", "float32", "--workers", 0)
    assert done.code == 0, done.err
    assert done.rows[0]["text"]
    assert "{" not in done.rows[0]["text"]


WORDS = {"a.png": "two dogs run", "b.png": "one cat", "c.png": "a red boat sails", "d.png": "snow"}
# What `--encoder` and `--decoder` name: checkpoints as they are published.
PARTS = [
    *((encoder, "gpt2") for encoder in ("clip_vision_model", "siglip_vision_model", "dinov2")),
    *(("vit", decoder) for decoder in ("roberta", "bart")),
]


@pytest.mark.parametrize(("encoder", "decoder"), PARTS)
def test_published_parts_become_a_captioner_that_plain_transformers_loads(
    tmp_path: Path, encoder: str, decoder: str
) -> None:
    save_encoder(tmp_path / "encoder", encoder)
    save_decoder(tmp_path / "decoder", decoder)
    photos, out = paint(tmp_path / "photos", *WORDS), tmp_path / "out"
    rows = "".join(f"{name},{text}\n" for name, text in WORDS.items())
    (tmp_path / "captions.csv").write_text(f"image,caption\n{rows}")
    parts = ("--encoder", tmp_path / "encoder", "--decoder", tmp_path / "decoder", "--tokenizer", "new")
    data = ("--data", tmp_path / "captions.csv", "--image-root", photos, "--vocab-size", 300, "--out", out)
    limits = ("--max-steps", 3, "--evaluate-every", 3, "--batch-size", 4, "--max-length", 12, "--learning-rate", 1e-2)
    flags = ("--dtype", "float32", "--device", "cpu", "--threads", 1, "--workers", 0)
    trained = call("train", *parts, *data, *limits, *flags)
    assert trained.code == 0, trained.err
    done = call("caption", photos, "--model", out, "-o", "-", "--dtype", "float32", "--workers", 0)
    assert done.code == 0, done.err
    assert {row["file_name"]: row["text"] for row in done.rows} == generated(out, photos)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("encoder", "out"))
    still = {name for name in after if name.startswith("encoder.") and torch.equal(after[name], base(before, name))}
    unused = ("encoder.head.", "encoder.post_layernorm.", "mask_token")
    assert all(any(part in name for part in unused) for name in still)


LEARNED = {"a.png": "word11 word12", "b.png": "word13 word14 word15", "c.png": "word12", "d.png": "word17 word11"}


@pytest.mark.parametrize(
    ("encoder", "decoder", "steps"), [("donut-swin", "mbart", 80), ("deit", "trocr, sinusoids", 2)]
)
def test_a_trained_captioner_is_trained_further(tmp_path: Path, encoder: str, decoder: str, steps: int) -> None:
    """80 steps are enough to learn the captions."""
    folder = save_captioner(tmp_path / "model", encoder=encoder, decoder=decoder, seed=1)
    photos, out = paint(tmp_path / "photos", *LEARNED), tmp_path / "out"
    rows = "".join(f"{name},{text}\n" for name, text in LEARNED.items())
    (tmp_path / "captions.csv").write_text(f"image,caption\n{rows}")
    data = ("--data", tmp_path / "captions.csv", "--image-root", photos, "--out", out)
    limits = ("--max-steps", steps, "--evaluate-every", steps, "--batch-size", 4, "--learning-rate", 4e-3)
    flags = ("--weight-decay", 0, "--dtype", "float32", "--device", "cpu", "--threads", 1, "--workers", 0)
    trained = call("train", "--model", folder, *data, *limits, *flags)
    assert trained.code == 0, trained.err
    done = call("caption", photos, "--model", out, "-o", "-", "--dtype", "float32", "--workers", 0)
    assert len(done.rows) == len(LEARNED)
    assert steps == 2 or {row["file_name"]: row["text"] for row in done.rows} == LEARNED


def base(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight of a published encoder that became the captioner's of this name; zeros for one that it lacks."""
    inner = name.removeprefix("encoder.")
    found = (f"{prefix}{inner}" for prefix in ("", "vision_model.", "vit.", "dinov2."))
    return next((weights[each] for each in found if each in weights), torch.zeros(()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "decoder", "profile", "layers"),
    [
        ("dinov2", "roberta", "portable", {"num_hidden_layers": 1}),
        ("donut-swin", "trocr, sinusoids", "fused", {"decoder_layers": 1}),
    ],
)  # BART's decoder is that of Florence-2
def test_an_engine_gives_the_same_captions(
    tmp_path: Path, encoder: str, decoder: str, profile: str, layers: dict[str, int]
) -> None:
    folder, engine = tmp_path / "model", tmp_path / "engine"
    save_captioner(folder, encoder=encoder, decoder=decoder, seed=1, **layers)
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(5)))
    done = call("export", "--onnx", "--model", folder, "--out", engine, "--profile", profile, "--device", "cpu")
    assert done.code == 0, done.err
    for search in ((), ("--num-beams", 3), ("--prompt", "word9 word11")):
        flags = ("-o", "-", "--max-new-tokens", 8, "--dtype", "float32", "--workers", 0, *search)
        found, expected = (call("caption", photos, "--model", model, *flags) for model in (engine, folder))
        assert found.code == expected.code == 0, found.err
        assert [row["text"] for row in found.rows] == [row["text"] for row in expected.rows]


def test_files_of_a_roberta_tokenizer_need_no_class(tmp_path: Path) -> None:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "\u0120", "\u0120a", "ab"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n\u0120 a\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    tokenizer: Any = load_tokenizer(ModelFiles("it", str(tmp_path), None, {"decoder": {"model_type": "trocr"}}, {}))
    assert tokenizer("ab a</s>", add_special_tokens=False)["input_ids"] == [9, 8, 2]
    assert tokenizer.decode([0, 9, 8, 2], skip_special_tokens=True) == "ab a"


@pytest.mark.parametrize("named", [True, False])
def test_pieces_of_xlm_roberta_have_the_ids_of_its_tokenizer(tmp_path: Path, named: bool) -> None:
    """For captioning and for training; the ids of the pieces themselves are others."""
    save_pieces(tmp_path)
    config: dict[str, Any] = {"decoder": {"model_type": "gpt2" if named else "trocr"}}
    if named:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    expected = transformers.XLMRobertaTokenizer.from_pretrained(tmp_path)("two dogs")["input_ids"]
    files = ModelFiles("it", str(tmp_path), None, config, {})
    for read in (load_tokenizer, read_tokenizer):
        tokenizer: Any = read(files)
        assert tokenizer("two dogs")["input_ids"] == expected


def test_the_gpu_does_not_decode_for_a_processor_that_pads() -> None:
    spec = PixelSpec.from_config({"image_processor_type": "DonutImageProcessor"})
    with pytest.raises(UsageError, match="--gpu-decode does not pad images"):
        refuse_gpu_decode(spec, torch.device("cuda"))


def test_an_encoder_that_transformers_cannot_pair_is_refused_by_name(tmp_path: Path) -> None:
    """ConvNeXt's features are maps, and its config has no hidden_size."""
    folder = save_captioner(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", {"encoder": config["encoder"] | {"model_type": "convnext"}})
    done = call("caption", paint(tmp_path / "photos", "a.png"), "--model", folder, "-o", "-", "--backend", "slots")
    assert done.code == 1
    assert "convnext and gpt2" in done.err
