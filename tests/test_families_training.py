"""Every family learns: captions it is shown it says, as plain transformers does, and what is frozen stays as it is."""

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

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")
families = pytest.mark.parametrize("family", FAMILIES)
SAID = {"a.png": "word11 word12", "b.png": "word13 word14 word15 word16", "c.png": "word12", "d.png": "word17 word11"}


@pytest.fixture(params=FAMILIES)
def untrained(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A captioner of a family as transformers makes it, and beside it four photos with captions."""
    torch.manual_seed(0)
    model, folder = FAMILIES[request.param](), tmp_path / request.param
    if request.param == "florence2":  # as its checkpoints are
        model.generation_config.update(decoder_start_token_id=END, forced_bos_token_id=START, forced_eos_token_id=END)
    model.save_pretrained(folder)
    save_words(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | PROCESSORS[request.param]))
    paint(tmp_path / "photos", *SAID)
    rows = "".join(f"{name},{text}\n" for name, text in SAID.items())
    (tmp_path / "photos" / "captions.csv").write_text(f"image,caption\n{rows}")
    return folder


def train(untrained: Path, *flags: object) -> Ended:
    data = ("--data", untrained.parent / "photos" / "captions.csv", "--out", untrained.parent / "out")
    steady = ("--dtype", "float32", "--device", "cpu", "--threads", 1, "--workers", 0, "--weight-decay", 0)
    return call("train", "--model", untrained, *data, *steady, *flags)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return held


def said(folder: Path, photo: Path) -> str:
    """What plain transformers says of a photo."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind, transformers.AutoModel).from_pretrained(folder).eval()
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(
        Image.open(photo).convert("RGB"), return_tensors="pt"
    ).pixel_values
    asked = prompted(model, asked_ids(folder)) if asks(model) else {}
    ids = model.generate(pixel_values=pixels, max_new_tokens=9, use_cache=model.config.model_type != "git", **asked)[0]
    return str(transformers.AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)).strip()


def asked_ids(folder: Path) -> tuple[int, ...]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tuple(tokenizer("What does the image describe?", add_special_tokens=False)["input_ids"])


def test_a_family_says_what_it_was_taught(
    untrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the command, to plain transformers, and to whoever runs the code on its card."""
    done = train(untrained, "--max-steps", 90, "--batch-size", 4, "--learning-rate", 4e-3)
    assert done.code == 0, done.err
    photos, out = untrained.parent / "photos", untrained.parent / "out"
    told = call("caption", photos, "--model", out, "-o", "-", "--dtype", "float32", "--max-new-tokens", 9)
    assert told.code == 0, told.err
    assert {row["file_name"]: row["text"] for row in told.rows} == SAID
    assert {name: said(out, photos / name) for name in SAID} == SAID
    monkeypatch.chdir(untrained.parent)  # where the card's code finds the folder
    shutil.copyfile(photos / "b.png", "photo.jpg")
    [code] = re.findall("```python\n(.*?)```", (out / "README.md").read_text("utf-8"), re.DOTALL)
    exec(compile(code, "card", "exec"), {"__name__": "card"})
    assert capsys.readouterr().out.strip() == SAID["b.png"]


@pytest.mark.parametrize(
    ("what", "more"), [("encoder", ()), ("decoder", ()), ("decoder", ("--gradient-checkpointing",))]
)
def test_what_is_frozen_stays_and_all_else_learns(untrained: Path, what: str, more: tuple[str, ...]) -> None:
    large = copy.deepcopy(random_of_family(untrained.name)).float()  # small ones get next to no gradient at first
    large.save_pretrained(untrained)
    done = train(untrained, "--max-steps", 2, "--learning-rate", 1e-2, "--freeze", what, "--batch-size", 4, *more)
    assert done.code == 0, done.err
    before, after = weights(untrained), weights(untrained.parent / "out")
    assert before.keys() == after.keys()
    family = family_of(json.loads((untrained / "config.json").read_text()))
    held = tuple(f"{part}." for part in {"encoder": family.ENCODER, "decoder": family.DECODER}[what])
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith(held)}
    assert frozen
    assert frozen <= stayed
    resting = {name for name, _ in large.named_buffers()} | {name for name in before if ".pooler." in name}
    assert not stayed - frozen - resting


def test_it_validates_and_goes_on(untrained: Path) -> None:
    flags = ("--max-steps", 4, "--evaluate-every", 2, "--val-fraction", 0.5, "--batch-size", 2)
    done = train(untrained, *flags)
    assert done.code == 0, done.err
    again = train(untrained, *flags[2:], "--max-steps", 6, "--resume")
    assert again.code == 0, again.err
    card = (untrained.parent / "out" / "README.md").read_text()
    assert "CIDEr" in card


def test_a_search_setting_that_cannot_be_kept_is_told(untrained: Path) -> None:
    done = train(untrained, "--max-steps", 1, "--num-beams", 3)
    if "blip" in (untrained / "config.json").read_text():
        assert done.code == 2
        assert "a blip keeps no --num-beams of its own: give it to capcli caption" in done.err
        return
    assert done.code == 0, done.err
    assert json.loads((untrained.parent / "out" / "generation_config.json").read_text())["num_beams"] == 3
