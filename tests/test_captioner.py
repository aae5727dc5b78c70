"""`Captioner`, the Python API: images of any kind in, captions out, in order."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import VOCABULARY, call, paint, save_captioner
from transformers import AutoImageProcessor, BertTokenizer, VisionEncoderDecoderModel

from capcli import Caption, Captioner, Failure
from capcli.errors import UsageError


@pytest.fixture(scope="module")
def model(captioner: Path) -> Captioner:
    return Captioner.load(str(captioner), dtype="float32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = paint(tmp_path_factory.mktemp("photos"), *(f"{n}.png" for n in range(6)), b"caf\xe9.png")
    return sorted(folder.iterdir())


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, capcli\n"
        "assert capcli.__version__ and 'Captioner' in dir(capcli) + capcli.__all__\n"
        "assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "try:\n    capcli.nosuch\nexcept AttributeError:\n    pass\nelse:\n    raise SystemExit('no such thing')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_captions_are_in_order_and_equal_those_of_the_command(model: Captioner, captioner: Path, photos: list[Path]):
    found = list(model.caption(photos))
    assert [caption.name for caption in found] == [os.fspath(path) for path in photos]
    rows = call("caption", *photos, "-m", captioner, "--dtype", "float32").rows
    assert [(row["text"], row["score"]) for row in rows] == [(c.text, round(c.score, 4)) for c in found]


def test_bytes_and_open_files_are_images(model: Captioner, photos: list[Path], tmp_path: Path):
    data = photos[0].read_bytes()
    (tmp_path / "text").write_text("no image")
    with photos[0].open("rb") as file, photos[0].open("rb") as closed, (tmp_path / "text").open() as text:
        closed.close()
        forms: list[Any] = [photos[0], data, bytearray(data), memoryview(data), io.BytesIO(data), file]
        found = list(model.caption([*forms, b"", b"nonsense", text, closed]))
    captions, failures = found[: len(forms)], found[len(forms) :]
    assert len({(caption.text, caption.score) for caption in captions}) == 1
    assert [result.name for result in found[1:]] == [str(number) for number in range(1, len(found))]
    assert [failure.error for failure in failures] == ["empty", "unknown-format", "unreadable", "unreadable"]
    assert "open it with mode 'rb'" in failures[2].message
    for one in (data, io.BytesIO(data)):
        with pytest.raises(TypeError, match="into a list"):
            model.caption(one)


def test_an_image_has_the_same_caption_as_path_image_and_array(model: Captioner, photos: list[Path]):
    with Image.open(photos[0]) as opened:
        image = opened.convert("RGB")
    array = np.asarray(image)
    forms: list[Any] = [str(photos[0]), photos[0], image, array, array / 255.0, image.convert("RGBA")]
    found = list(model.caption(forms))
    assert len({(caption.text, caption.score) for caption in found}) == 1
    assert [caption.name for caption in found] == [str(photos[0])] * 2 + ["2", "3", "4", "5"]


def test_failures_are_in_the_place_of_their_images(model: Captioner, photos: list[Path], tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    images: list[Any] = [
        tmp_path / "gone.png",
        photos[0],
        str(tmp_path / "broken.png"),
        np.zeros((3, 3, 9)),
        np.full((4, 4), np.nan),
        None,
        7,
        Image.new("RGB", (0, 5)),
        photos[1],
    ]
    found = list(model.caption(images))
    assert [type(result) for result in found] == [Failure, Caption, *[Failure] * 6, Caption]
    assert [result.name for result in found[:4]] == [str(images[0]), str(photos[0]), images[2], "3"]
    assert [result.error for result in found if isinstance(result, Failure)][:2] == ["missing", "unknown-format"]
    assert all(result.message for result in found if isinstance(result, Failure))
    small = list(model.caption([photos[0]], max_pixels=10))
    assert isinstance(small[0], Failure)
    assert small[0].error == "too-large"


def test_images_are_read_only_as_they_are_needed(model: Captioner, photos: list[Path]):
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield photos[0]

    captions = model.caption(endless(), batch_size=2)
    assert taken == 0
    for number in range(20):
        assert isinstance(next(captions), Caption)
        assert taken <= number + 8
    captions.close()  # type: ignore[attr-defined]


def test_settings_have_the_names_of_transformers(model: Captioner, photos: list[Path]):
    usual = [caption.text for caption in model.caption(photos)]
    several = list(model.caption(photos, num_beams=3, num_return_sequences=2, max_new_tokens=5))
    assert all(isinstance(found, Caption) and len(found.candidates) == 2 for found in several)
    assert all(len(found.text.split()) <= 5 for found in several if isinstance(found, Caption))
    sampled = [[c.text for c in model.caption(photos, do_sample=True, seed=seed)] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    kept = [c.text for c in model.caption(photos, prompt="word30", keep_prompt=True)]
    assert all(text.startswith("word30") for text in kept)
    assert [caption.text for caption in model.caption(photos, batch_size=1)] == usual
    assert list(model.caption([])) == []


def test_wrong_settings_raise_at_once(model: Captioner, captioner: Path):
    with pytest.raises(TypeError, match="no setting num_beam; it has num_beams, "):
        model.caption([], num_beam=3)
    for wrong in (
        {"num_beams": 0},
        {"top_p": 2},
        {"num_return_sequences": 2},
        {"max_new_tokens": 999},
        {"batch_size": 0},
    ):
        with pytest.raises(
            UsageError, match="beams" if "num_return_sequences" in wrong else next(iter(wrong)).replace("_", "[-_]")
        ):
            model.caption([], **wrong)
    with pytest.raises(UsageError, match="abacus"):
        Captioner.load(str(captioner), device="abacus")
    with pytest.raises(UsageError, match="abacus"):
        Captioner.load(str(captioner), dtype="abacus")
    with pytest.raises(UsageError, match="No such folder"):
        Captioner.load("./nosuch")


# A WordPiece vocabulary: Chinese characters and punctuation, Latin words and parts of words, and three special tokens.
HAN = [*"。《》", *(chr(0x4E00 + 7 * n) for n in range(50))]
LATIN = ["##s", "##ling", "##er", "tv", "2", "café", *(f"word{n}" for n in range(VOCABULARY - len(HAN) - 9))]
WORDPIECES = [*HAN, *LATIN, "[PAD]", "[CLS]", "[SEP]"]


def text_of(pieces: list[str]) -> str:
    """The text of pieces: spaces between them, except between Chinese characters and before parts of words (##)."""
    text = "".join(pieces[:1])
    for before, piece in pairwise(pieces):
        joined = piece.startswith("##") or (before in HAN and piece in HAN)
        text += piece.removeprefix("##") if joined else f" {piece}"
    return text


def test_chinese_is_written_without_spaces_and_latin_words_with_them(tmp_path: Path):
    model = save_captioner(tmp_path / "chinese", decoder="bert", ends=0.05)
    tokenizer = BertTokenizer(vocab={piece: n for n, piece in enumerate(WORDPIECES)}, unk_token="[PAD]")
    tokenizer.save_pretrained(model)
    photos = paint(tmp_path / "photos", *(f"{n:02d}.png" for n in range(12)))
    reference = VisionEncoderDecoderModel.from_pretrained(model).eval()
    processor = AutoImageProcessor.from_pretrained(model)
    expected: list[list[str]] = []
    for path in sorted(photos.iterdir()):
        with Image.open(path) as image:
            values = processor(image.convert("RGB"), return_tensors="pt").pixel_values
        found = reference.generate(values, num_beams=4, num_return_sequences=4).tolist()
        expected += [[WORDPIECES[token] for token in ids if token < VOCABULARY - 3] for ids in found]
    kinds = {(a in HAN, b in HAN) for pieces in expected for a, b in pairwise(pieces) if not b.startswith("##")}
    assert len(kinds) == 4, "Chinese and Latin pieces follow each other in every combination"
    beams = ["--num-beams", 4, "--num-return-sequences", 4]
    done = call("caption", photos, "-m", model, "--dtype", "float32", *beams)
    assert done.code == 0, done.err
    assert [c["text"] for row in done.rows for c in row["candidates"]] == [text_of(pieces) for pieces in expected]


def test_a_warning_within_the_package_is_an_error_in_tests():
    for module in ("capcli", "capcli.captioning.pipeline", "capcli.models.build"):
        with pytest.raises(UserWarning, match="heard"):
            exec("import warnings; warnings.warn('heard')", {"__name__": module, "__warningregistry__": {}})
    with warnings.catch_warnings(record=True) as heard:
        exec("import warnings; warnings.warn('passed')", {"__name__": "elsewhere", "__warningregistry__": {}})
    assert len(heard) == 1
