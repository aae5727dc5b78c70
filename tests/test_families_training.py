"""Training in every family: it learns captions that transformers then generates too, and frozen weights do not change."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import END, FAMILIES, PROCESSORS, START, asks, prompted, random_of_family
from PIL import Image
from running import PROCESSOR, Ended, call, paint, save_words
from safetensors.torch import load_file

from capcli.models.families import family_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:transformers")]
CAPTIONS = {
    "a.png": "word11 word12",
    "b.png": "word13 word14 word15 word16",
    "c.png": "word12",
    "d.png": "word17 word11",
}


@pytest.fixture(params=FAMILIES)
def untrained(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A captioner of a family with transformers' initial weights; beside it a folder of four photos with captions."""
    torch.manual_seed(0)
    model, folder = FAMILIES[request.param](), tmp_path / request.param
    if request.param == "florence2":  # as in its checkpoints
        model.generation_config.update(decoder_start_token_id=END, forced_bos_token_id=START, forced_eos_token_id=END)
    model.save_pretrained(folder)
    save_words(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | PROCESSORS[request.param]))
    paint(tmp_path / "photos", *CAPTIONS)
    rows = "".join(f"{name},{text}\n" for name, text in CAPTIONS.items())
    (tmp_path / "photos" / "captions.csv").write_text(f"image,caption\n{rows}")
    return folder


def train(untrained: Path, *flags: object) -> Ended:
    data = ("--data", untrained.parent / "photos" / "captions.csv", "--out", untrained.parent / "out")
    fixed = ("--dtype", "float32", "--device", "cpu", "--threads", 1, "--workers", 0, "--weight-decay", 0)
    return call("train", "--model", untrained, *data, *fixed, *flags)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def generated(folder: Path, photo: Path) -> str:
    """The caption of transformers' generate()."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind, transformers.AutoModel).from_pretrained(folder).eval()
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(
        Image.open(photo).convert("RGB"), return_tensors="pt"
    ).pixel_values
    question = prompted(model, question_ids(folder)) if asks(model) else {}
    ids = model.generate(pixel_values=pixels, max_new_tokens=9, use_cache=model.config.model_type != "git", **question)[
        0
    ]
    return str(transformers.AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)).strip()


def question_ids(folder: Path) -> tuple[int, ...]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tuple(tokenizer("What does the image describe?", add_special_tokens=False)["input_ids"])


def test_a_family_learns_captions(
    untrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`capcli caption`, transformers' generate() and the code of the model card all give the captions of training."""
    flags = ("--batch-size", 4, "--learning-rate", 4e-3, "--evaluate-every", 90)  # an epoch is one step
    done = train(untrained, "--max-steps", 90, *flags)
    assert done.code == 0, done.err
    photos, out = untrained.parent / "photos", untrained.parent / "out"
    result = call("caption", photos, "--model", out, "-o", "-", "--dtype", "float32", "--max-new-tokens", 9)
    assert result.code == 0, result.err
    assert {row["file_name"]: row["text"] for row in result.rows} == CAPTIONS
    assert {name: generated(out, photos / name) for name in CAPTIONS} == CAPTIONS
    monkeypatch.chdir(untrained.parent)  # the code of the card names the folder relative to here
    shutil.copyfile(photos / "b.png", "photo.jpg")
    [code] = re.findall("```python\n(.*?)```", (out / "README.md").read_text("utf-8"), re.DOTALL)
    exec(compile(code, "card", "exec"), {"__name__": "card"})
    assert capsys.readouterr().out.strip() == CAPTIONS["b.png"]


@pytest.mark.parametrize(
    ("part", "more"), [("encoder", ()), ("decoder", ()), ("decoder", ("--gradient-checkpointing",))]
)
def test_frozen_weights_stay_and_all_others_learn(untrained: Path, part: str, more: tuple[str, ...]) -> None:
    large = copy.deepcopy(random_of_family(untrained.name)).float()  # initial weights get hardly any gradient at first
    large.save_pretrained(untrained)
    flags = ("--max-steps", 2, "--evaluate-every", 2, "--learning-rate", 1e-2, "--batch-size", 4)
    done = train(untrained, *flags, "--freeze", part, *more)
    assert done.code == 0, done.err
    before, after = weights(untrained), weights(untrained.parent / "out")
    assert before.keys() == after.keys()
    family = family_of(json.loads((untrained / "config.json").read_text()))
    modules = tuple(f"{name}." for name in {"encoder": family.ENCODER, "decoder": family.DECODER}[part])
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith(modules)}
    assert frozen
    assert frozen <= unchanged
    never_trained = {name for name, _ in large.named_buffers()} | {name for name in before if ".pooler." in name}
    assert not unchanged - frozen - never_trained


def test_it_validates_with_beams_and_resumes(untrained: Path) -> None:
    """A BLIP cannot save the number of beams, so it validates greedily."""
    beams = () if untrained.name == "blip" else ("--num-beams", 3)
    flags = ("--evaluate-every", 1, "--val-fraction", 0.5, "--batch-size", 2, *beams)
    done = train(untrained, "--max-steps", 1, *flags)
    assert done.code == 0, done.err
    out = untrained.parent / "out"
    if beams:
        assert json.loads((out / "generation_config.json").read_text())["num_beams"] == 3
    again = train(untrained, "--max-steps", 2, *flags, "--resume")
    assert again.code == 0, again.err
    assert "CIDEr" in (out / "README.md").read_text()


@pytest.mark.parametrize("untrained", ["blip"], indirect=True)
def test_a_search_setting_that_the_family_cannot_save_is_refused(untrained: Path) -> None:
    done = train(untrained, "--max-steps", 1, "--num-beams", 3)
    assert done.code == 2
    assert "a blip cannot save --num-beams: give it to capcli caption instead" in done.err
