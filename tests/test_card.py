"""The model card is correct, does not describe the machine, escapes any text, and its code runs as printed."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from running import call, paint, save_captioner

from capcli.captioning import slot_captioner as captioning
from capcli.errors import CapcliError
from capcli.text import as_text, printable
from capcli.training.output import card
from capcli.training.output.card import CardFacts, SplitFacts, write_card

FACTS = CardFacts(
    name="/home/me/runs/flickr",
    encoder="ViT, 12 layers, 768 wide, from google/vit-base-patch16-224",
    decoder="GPT-2, 12 layers, 768 wide, from /home/me/models/my_gpt2",
    parameters=239_195_904,
    image_size=(224, 192),
    tokenizer="byte-level BPE, 50,257 tokens, of the decoder",
    special_tokens={"start": ("<|endoftext|>", 50256), "end": ("<|endoftext|>", 50256), "pad": ("!", 0)},
    data_files=["/srv/data/flickr8k/captions.txt", "more/captions.zh.txt", "/srv/data/flickr8k/captions.txt"],
    splits={"train": SplitFacts(images=6300, captions=31_500), "val": SplitFacts(images=700, captions=3500)},
    left_out={"missing": 3, "empty caption": 12, "broken": 0},
    settings={
        "learning_rate": 5e-5,
        "batch_size": 16,
        "resume": False,
        "max_steps": None,
        "data": {"data": ("/srv/data/flickr8k/captions.txt",), "image_root": PurePosixPath("/srv/data/images")},
        "out": "/home/me/runs/flickr",
        "schedule": "cosine",
    },
    step=4500,
    validation_loss=2.40321,
    scores={"CIDEr": 0.51237, "Bleu_4": 0.2},
    validation_images=700,
    generation={"num_beams": 4, "max_new_tokens": 30},
    base_models=["google/vit-base-patch16-224", "gpt2", "/home/me/models/my_gpt2", "../here", "~/there"],
)
HOSTILE = "x\n---\n| a | `b` ``` ![i](http://evil) <script>alert(1)</script> [l](j) $m$ \\ # \x1b[31m 日本 \udcff"


def written(folder: Path, facts: CardFacts) -> str:
    folder.mkdir(exist_ok=True)
    write_card(folder, facts)
    return (folder / "README.md").read_text(encoding="utf-8")


def front(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    loaded: dict[str, Any] = yaml.safe_load(head)
    return loaded


def parsed(text: str) -> list[Token]:
    """The Markdown tokens of the card after its front matter; those of inline text follow their block."""
    blocks = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    return [token for block in blocks for token in (block, *(block.children or ()))]


def tables(text: str) -> list[list[list[str]]]:
    """The text of the cells of every table."""
    found: list[list[list[str]]] = []
    for token in parsed(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("")
        elif found and token.type in ("text", "code_inline") and found[-1]:
            found[-1][-1][-1] += token.content
        elif token.type == "table_close":
            found.append([])
    return [table for table in found if table]


def fence(text: str, language: str) -> str:
    (code,) = [token.content for token in parsed(text) if token.type == "fence" and token.info == language]
    return code


def test_the_card_has_all_facts(tmp_path: Path) -> None:
    text = written(tmp_path, FACTS)
    assert front(text) == {
        "library_name": "transformers",
        "pipeline_tag": "image-to-text",
        "tags": ["image-captioning", "image-to-text", "vision-encoder-decoder", "capcli"],
        "base_model": ["google/vit-base-patch16-224", "gpt2"],
    }
    what, splits, settings, scores = tables(text)
    assert what[1:] == [
        ["encoder", "ViT, 12 layers, 768 wide, from google/vit-base-patch16-224"],
        ["decoder", "GPT-2, 12 layers, 768 wide, from my_gpt2"],
        ["parameters", "239,195,904"],
        ["image size", "192 x 224 pixels"],
        ["tokenizer", "byte-level BPE, 50,257 tokens, of the decoder"],
        ["special tokens", "start <|endoftext|> (50256), end <|endoftext|> (50256), pad ! (0)"],
    ]
    assert splits[1:] == [["train", "6,300", "31,500"], ["val", "700", "3,500"]]
    assert settings[1:] == [
        ["learning_rate", "5e-05"],
        ["batch_size", "16"],
        ["resume", "false"],
        ["data.data", "captions.txt"],
        ["data.image_root", "images"],
        ["out", "flickr"],
        ["schedule", "cosine"],
    ]
    assert scores[1:] == [["validation loss", "2.4032"], ["CIDEr", "0.5124"], ["Bleu_4", "0.2000"]]
    assert "# flickr\n" in text
    assert "Read from `captions.txt`, `captions.zh.txt`.\n" in text
    assert "Left out: 3 missing, 12 empty caption." in text
    assert "On 700 validation images, with the weights of step 4,500." in text
    assert "generated with `num_beams=4`, `max_new_tokens=30`." in text
    assert "31,500 captions of 6,300 images" in text


def test_huggingface_hub_reads_the_card(tmp_path: Path) -> None:
    read = ModelCard(written(tmp_path, FACTS)).data
    assert (read.library_name, read.pipeline_tag) == ("transformers", "image-to-text")
    assert read.base_model == ["google/vit-base-patch16-224", "gpt2"]


def test_the_card_has_no_paths_of_the_machine(tmp_path: Path) -> None:
    windows = "C:\\Users\\me\\photos"
    places = {
        "out": windows,
        "share": "\\\\server\\me\\photos",
        "home": "~/me/photos/",
        "address": "file:///home/me/photos",
        "list": ["/home/me/a b/photos", b"/home/me/photos"],
        "words": "root=/home/me/photos, (/home/me/photos) and 'D:/me/photos'",
    }
    text = written(
        tmp_path, replace(FACTS, settings=places, name=windows, tokenizer="SentencePiece of /home/me/photos")
    )
    assert not re.search(r"[/\\]me\b|/home|/srv|Users|server", text)
    assert [row[1] for row in tables(text)[2][1:]] == [
        "photos",
        "photos",
        "photos",
        "photos",
        "photos, photos",
        "root=photos, (photos) and 'photos'",
    ]
    kept = {"url": "https://example.org/a/b", "id": "google/vit-base", "both": "s3://bucket/a 1/2 and / or"}
    assert [row[1] for row in tables(written(tmp_path, replace(FACTS, settings=kept)))[2][1:]] == list(kept.values())


def test_any_text_stays_text(tmp_path: Path) -> None:
    facts = replace(
        FACTS,
        name=HOSTILE.replace("/", ""),
        encoder=HOSTILE,
        tokenizer=HOSTILE,
        special_tokens={"start": (HOSTILE, 1), "pad": ("`", 2), "end": ("", 3), HOSTILE: ("|", 4)},
        data_files=[HOSTILE],
        splits={HOSTILE: SplitFacts(images=1, captions=2)},
        left_out={HOSTILE: 1},
        settings={HOSTILE: HOSTILE, "list": [HOSTILE, "|"]},
        scores={HOSTILE: 0.5},
        generation={HOSTILE: HOSTILE},
        base_models=[HOSTILE],
        architecture=HOSTILE,
    )
    text = written(tmp_path, facts)
    assert "\x1b" not in text
    assert front(text)["tags"][2] == as_text(printable(HOSTILE))
    assert "base_model" not in front(text)
    tokens = parsed(text)
    assert {token.type for token in tokens}.isdisjoint({"html_block", "html_inline", "image", "link_open", "hr"})
    assert sum(token.type == "heading_open" for token in tokens) == 6
    assert [{len(row) for row in table} for table in tables(text)] == [{2}, {3}, {2}, {2}]
    assert tables(text)[2][2] == ["list", f"{tables(text)[2][1][0]}, |"]
    assert "<script>alert(1)</script>" in tables(text)[2][1][0]
    compile(fence(text, "python"), "card", "exec")
    assert fence(text, "sh").count("\n") == 1


def test_unknown_facts_are_left_out(tmp_path: Path) -> None:
    bare = CardFacts(
        name="a",
        encoder="ViT",
        decoder="GPT-2",
        parameters=1,
        image_size=(8, 8),
        tokenizer="its own",
        special_tokens={},
        data_files=[],
        splits={"train": SplitFacts(images=1, captions=1)},
    )
    text = written(tmp_path, bare)
    assert set(front(text)) == {"library_name", "pipeline_tag", "tags"}
    assert "Not evaluated: there were no validation images." in text
    for word in ("None", "Left out", "Read from", "curves.png", "generated with"):
        assert word not in text
    assert "validation images" in written(tmp_path, replace(bare, validation_loss=1.0))


def test_curves_are_shown_if_the_file_exists(tmp_path: Path) -> None:
    (tmp_path / "curves.png").write_bytes(b"")
    images = [token for token in parsed(written(tmp_path, FACTS)) if token.type == "image"]
    assert [image.attrs["src"] for image in images] == ["curves.png"]


@pytest.mark.parametrize("name", ["my captioner", 'l\'été "犬"'])
def test_the_code_on_the_card_captions_as_capcli_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = save_captioner(tmp_path / name)
    paint(tmp_path, "photo.jpg", "photos/photo.jpg")
    text = written(folder, replace(FACTS, name=str(folder)))
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(fence(text, "python"), "card", "exec"), {"__name__": "card"})
    caption = out.getvalue().strip()
    assert caption
    command = shlex.split(fence(text, "sh"))
    assert command[0] == "capcli"
    assert call(*command[1:], "--dtype", "float32", "--workers", 0).code == 0
    (row,) = call("caption", "photo.jpg", "--model", folder, "--dtype", "float32", "--workers", 0).rows
    assert row["text"] == caption


def test_the_code_removes_the_spaces_of_a_character_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_captioner(tmp_path / "m")
    vocabulary = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(re.sub(r'"word(\d+)"', lambda m: f'"{chr(0x4E00 + int(m[1]))}"', vocabulary))
    paint(tmp_path, "photo.jpg")
    monkeypatch.chdir(tmp_path)
    captions = []
    for spaced in (False, True):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(fence(written(folder, replace(FACTS, name=str(folder), spaced=spaced)), "python"), {})
        captions.append(out.getvalue().strip())
    assert " " in captions[0]
    assert captions[1] == captioning.UNSPACED.sub("", captions[0])
    assert re.search("[\u4e00-\u4e80]{2}", captions[1])
    assert card.WIDE.encode().decode("unicode_escape") == captioning.WIDE


def test_a_card_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CapcliError, match=r"file/README.md cannot be written"):
        write_card(tmp_path / "file", FACTS)
