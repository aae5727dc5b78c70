"""Several tasks in one run: masked captions, class folders, sampling by weight, resumption, and T5 captioners."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from assembling import CAPTIONS, GPT2, VIT, new, save_encoder, save_pieces, write_json
from PIL import Image
from running import Ended, call, paint
from training import BRIEF, COLOURS, ENCODER, SHAPES, history, paint_data, weights
from transformers import AutoModel, T5Config, T5ForConditionalGeneration

from capcli import Captioner
from capcli.annotations import read_split
from capcli.decoding.loop import Finished
from capcli.decoding.search import Hypothesis
from capcli.errors import UsageError
from capcli.models.vision_t5 import QUESTION, encoder_prompt
from capcli.options import DataOptions, GenerationOptions
from capcli.records import Caption, Loaded
from capcli.training.data.masking import SHARE, MaskedPairs, choose, encode_words, gaps_of
from capcli.training.data.mixing import TaskMixture, TaskSampler, shares
from capcli.training.data.pairs import Pairs
from capcli.training.loop.freezing import refuse_freezing
from capcli.training.loop.task_validation import restored as gaps_restored
from capcli.training.loop.task_validation import right
from capcli.training.loop.trainer import hide_patches, patch_size, save_captioner
from capcli.training.model.tokenizers import SpecialTokens, encode_captions, load_tokenizer

T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 24,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 2,
}
GAPS, END = (900, 901, 902, 903), 1
# A run of two steps and one evaluation of one image.
SHORT = (
    *("--tokenizer", "new", "--max-steps", 2, "--evaluate-every", 2, "--caption-images", 1, "--max-new-tokens", 4),
    *("--device", "cpu", "--threads", 1, "--workers", 0),
)


def masked(words: Sequence[Sequence[int]], seed: int = 7, **more: Any) -> MaskedPairs:
    settings = {"gaps": GAPS, "end": END, "max_length": 99, "seed": seed} | more
    return MaskedPairs(None, [[words]], **settings)  # type: ignore[arg-type]


def restored(question: Sequence[int], answer: Sequence[int]) -> list[int]:
    """The question with each gap replaced by the answer's tokens for it."""
    filling: dict[int, list[int]] = {}
    for token in answer:
        filling.setdefault(token, []) if token in GAPS else filling[list(filling)[-1]].append(token)
    return [i for token in question for i in (filling[token] if token in GAPS else [token])]


@pytest.mark.parametrize("count", [1, 2, 7, 13, 40])
def test_question_and_answer_together_give_the_caption(count: int) -> None:
    words = [[10 * n + k for k in range(2, 3 + n % 3)] for n in range(count)]
    pairs = masked(words)
    for draw in range(20):
        question, answer = pairs.masked(0, draw)
        assert question[-1] == answer[-1] == END
        assert restored(question[:-1], answer[:-1].tolist()) == [i for word in words for i in word]
        hidden = sum(words[n][0] not in question for n in range(count))
        assert hidden == min(max(1, round(SHARE * count)), len(GAPS) - 1)
        assert answer[-2] == GAPS[sum(gap in question for gap in GAPS)], "the last gap closes the answer"


def test_masks_depend_on_draw_and_seed_alone() -> None:
    words = [[n] for n in range(2, 30)]

    def drawn(seed: int) -> list[tuple[int, ...]]:
        return [tuple(masked(words, seed).masked(0, draw)[1]) for draw in range(9)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 5


def test_words_together_are_the_tokens_of_the_caption(tmp_path: Path) -> None:
    assembled = new(vocab_size=320)
    specials = assembled.specials
    for text, words in zip(CAPTIONS, encode_words(assembled.tokenizer, CAPTIONS, specials), strict=True):
        [label] = encode_captions(assembled.tokenizer, [text], specials, 999)
        assert [i for word in words for i in word] == label[:-1]
        assert len(words) == (len(text.split()) if " " in text else len(label) - 1)
    save_pieces(tmp_path)
    pieces = load_tokenizer(str(tmp_path))
    [words] = encode_words(pieces, ["the brown dog"], SpecialTokens(1, 2, 2))
    assert [pieces.decode(word) for word in words] == ["the", "brown", "dog"]


@pytest.mark.parametrize("pieces", [False, True])
def test_a_prompt_with_gaps_has_the_tokens_of_training(tmp_path: Path, pieces: bool) -> None:
    if pieces:
        save_t5(tmp_path, gated=False)
    tokenizer = new(decoder=str(tmp_path), tokenizer=None).tokenizer if pieces else new(decoder=T5).tokenizer
    specials = SpecialTokens(tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    text = "two dogs are running on the sand"
    [words] = encode_words(tokenizer, [text], specials)
    pairs = masked(words, gaps=gaps_of(tokenizer), end=specials.end)
    for draw in range(9):
        trained_on, _ = pairs.masked(0, draw)
        hidden = choose(len(words), np.random.default_rng((7, 0, draw)), 9).index(True)
        prompt = " ".join("<extra_id_0>" if n == hidden else word for n, word in enumerate(text.split()))
        assert encoder_prompt({}, tokenizer, prompt) == trained_on


def test_answers_are_compared_without_spaces_and_gap_by_gap() -> None:
    assert right("a photo  of cat", ("a photo of dog", "a photo of cat"))
    assert not right("a photo of ca", ("a photo of cat",))
    answer = "<extra_id_0> two <extra_id_1> right of <extra_id_2>"
    assert gaps_restored(answer, answer) == [True, True]
    assert gaps_restored("<extra_id_0> two <extra_id_1> right", answer) == [True, False]
    assert gaps_restored("<extra_id_0> <extra_id_1>right of<extra_id_2> two", answer) == [False, True]
    assert gaps_restored("two right of", answer) == gaps_restored("", answer) == [False, False]


@pytest.mark.parametrize("pieces", [False, True])
def test_only_the_answer_to_a_prompt_with_gaps_names_them(tmp_path: Path, pieces: bool) -> None:
    if pieces:
        save_t5(tmp_path / "t5", gated=False)
    assembled = new(decoder=str(tmp_path / "t5") if pieces else T5, tokenizer=None if pieces else "new")
    save_captioner(str(tmp_path / "out"), assembled.model, assembled.tokenizer, assembled.processor)
    captioner = Captioner.load(str(tmp_path / "out"), device="cpu").core
    text = "<extra_id_0> two dogs <extra_id_1> sand <extra_id_2>"
    tokens = [
        assembled.specials.pad,
        *assembled.tokenizer(text, add_special_tokens=False)["input_ids"],
        assembled.specials.end,
    ]
    done = Finished((0, None), [Hypothesis(tuple(tokens), 0.0, 0.0)])
    loaded = Loaded("one.png", np.zeros((0, 8, 3), np.uint8))
    with_gaps = captioner.settings(GenerationOptions(), "a <extra_id_0> on <extra_id_1>")
    filled = captioner.result(loaded, done, with_gaps)
    assert isinstance(filled, Caption)
    assert gaps_restored(filled.text, text) == [True, True]
    assert filled.text.startswith("<extra_id_0> two")
    assert filled.text.endswith(" sand <extra_id_2>")
    plain = captioner.result(loaded, done, captioner.settings(GenerationOptions(), "what is it?"))
    assert isinstance(plain, Caption)
    assert "extra_id" not in plain.text


def test_truncated_answers_are_counted() -> None:
    words = [[2], [3, 4, 5], [6]]
    assert masked(words, max_length=8).count_truncated(END) == 0
    for most in range(2, 9):
        pairs = masked(words, max_length=most)
        assert pairs.count_truncated(END) == (pairs.masked(0)[1][-1] != END)
    assert masked(words, max_length=3).count_truncated(END) == 1


class Numbers(Pairs):
    """Pairs that are only their name, index and draw."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def pair(self, index: int, draw: int = 0) -> Any:
        return self.name, index, draw


def epoch(mixed: TaskMixture, number: int, seed: int = 3) -> list[Any]:
    drawn = TaskSampler(mixed, seed)
    drawn.set_epoch(number)
    serials = list(drawn)
    assert len(serials) == len(drawn) == len(mixed)
    return [mixed[serial] for serial in serials]


def test_tasks_are_drawn_by_weight_and_pairs_repeat_only_after_all_were_drawn() -> None:
    mixed = TaskMixture([Numbers("a", 100), Numbers("b", 10), Numbers("c", 90)], [1, 1, 2])
    for number in range(3):
        drawn = epoch(mixed, number)
        assert Counter(name for name, _, _ in drawn) == {"a": 50, "b": 50, "c": 100}
        assert set(Counter(index for name, index, _ in drawn if name == "b").values()) == {5}
        assert set(Counter(index for name, index, _ in drawn if name == "c").values()) == {1, 2}
    every = [pair for number in range(3) for pair in epoch(mixed, number)]
    assert len(set(every)) == len(every), "a repeated pair has another draw"
    assert epoch(mixed, 1) == epoch(mixed, 1)
    assert [pair[:2] for pair in epoch(mixed, 1)] != [pair[:2] for pair in epoch(mixed, 2)]
    assert epoch(mixed, 1, seed=4) != epoch(mixed, 1)


def test_shares_add_up_to_the_total() -> None:
    assert shares(10, [1, 1, 1]) == [3, 4, 3]
    assert sum(shares(1001, [0.3, 7, 0.01])) == 1001
    assert shares(10, [1e308, 1e308]) == [5, 5]
    assert shares(10, [1e308, 1e-308]) == [10, 0]


def test_whole_patches_are_hidden_the_same_number_in_every_image() -> None:
    torch.manual_seed(1)
    hidden = hide_patches(torch.ones(5, 3, 30, 40), 8, 0.75)
    patches = torch.nn.functional.pad(hidden, (0, 0, 0, 2)).unfold(2, 8, 8).unfold(3, 8, 8)
    seen = patches[:, 0, :3].flatten(3).amin(-1)  # the lowest row is cut
    assert torch.equal(seen, patches[:, 0, :3].flatten(3).amax(-1))
    cells = hidden[:, 0, ::8, ::8]
    assert cells.shape[1:] == (4, 5)
    assert (cells == 0).flatten(1).sum(1).tolist() == [15] * 5
    assert len({tuple(image.flatten().tolist()) for image in cells}) > 1
    assert patch_size(T5Config()) == 16
    assert patch_size(new(encoder=VIT).model.config.encoder) == 8


def class_folders(folder: Path, count: int = 4) -> Path:
    for number, (colour, rgb) in enumerate(COLOURS.items()):
        for n in range(count):
            pixels = np.random.default_rng((number, n)).integers(90, 130, (32, 32, 3), dtype=np.uint8)
            pixels[list(SHAPES.values())[n % len(SHAPES)]] = rgb
            path = folder / ("val" if n == 0 else "train") / f"deep {colour}" / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def test_folders_of_images_are_read_as_classes(tmp_path: Path) -> None:
    paint(tmp_path / "all", "train/a dog/1.png", "train/a dog/more/2.png", "val/тест/3.jpg", "train/4.png", "5.png")
    split = read_split(DataOptions(data=(str(tmp_path / "all"),), label_template="a photo of {label}"))
    labels = {image.name: image.captions for image in (*split.train, *split.val)}
    assert labels == {
        "train/a dog/1.png": ("a photo of a dog",),
        "train/a dog/more/2.png": ("a photo of more",),
        "val/тест/3.jpg": ("a photo of тест",),
    }
    assert [each.name for each in split.val] == ["val/тест/3.jpg"]


def test_prepare_stores_labels(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "classes")
    flags = ("--label-template", "this is {label}", "--out", tmp_path / "copy", "--workers", 0)
    done = call("prepare", "--data", folder, *flags)
    assert done.code == 0, done.err
    split = read_split(DataOptions(data=(str(tmp_path / "copy"),)))
    assert len(split.train) == 12
    assert {each.captions for each in split.val} == {(f"this is deep {colour}",) for colour in COLOURS}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with captioned pictures, and pictures in class folders."""
    paint_data(tmp_path / "pictures")
    class_folders(tmp_path / "classes")
    return tmp_path


def recipe(place: Path, **train: Any) -> Path:
    captions = str(place / "pictures" / "captions.txt")
    sections = {
        "model": {"tokenizer": "new", "vocab_size": 300, "encoder": ENCODER, "decoder": T5, "extra_tokens": 3},
        "train": BRIEF | train,
        "task": [
            {"name": "say", "data": captions, "val_fraction": 0.25, "weight": 2},
            {"name": "sort", "kind": "classify", "data": str(place / "classes"), "question": "which colour?"},
            {"name": "fill", "kind": "masked", "data": captions, "val_fraction": 0.25},
        ],
        "generation": {"max_new_tokens": 6},
    }
    path = place / "tasks.toml"
    path.write_text(tomli_w.dumps(sections))
    return path


def train(place: Path, out: str, *flags: object, **settings: Any) -> Ended:
    return call("train", "--config", recipe(place, **settings), "--out", place / out, *flags)


def test_a_run_reports_every_task_and_resumes_with_the_same_batches(place: Path) -> None:
    fixed = {"schedule": "constant", "batch_size": 12, "evaluate_every": 6}  # 4 steps are an epoch
    whole = train(place, "whole", max_steps=9, **fixed)
    assert whole.code == 0, whole.err
    assert "21 images to train on, 7 to validate" in whole.err
    rows = history(place / "whole")
    figures = {"say_loss", "sort_loss", "fill_loss", "CIDEr", "sort_accuracy", "fill_restored"}
    assert all(rows[step - 1][name] for step in (6, 9) for name in figures)
    assert "sort_accuracy" in whole.err
    assert "(reference: a photo of deep " in whole.err
    card = (place / "whole" / "README.md").read_text()
    assert "| fill\\_restored |" in card
    assert "`task.2.question` | `which colour?`" in card
    assert "On 7 validation images, with 6 answers (the loss covers all)" in card
    for row in (
        f"| say | `{QUESTION}` |",
        "| sort | `which colour?` |",
        "| fill | `a <extra_id_0> on the <extra_id_1>` |",
    ):
        assert row in card
    settings = tomllib.loads((place / "whole" / "train.toml").read_text())
    assert [task["name"] for task in settings["task"]] == ["say", "sort", "fill"]

    cut = train(place, "cut", max_steps=6, **fixed)
    assert cut.code == 0, cut.err
    resumed = call("train", "--resume", "--out", place / "cut", "--max-steps", 9)
    assert resumed.code == 0, resumed.err
    assert weights(place / "whole") == weights(place / "cut")
    assert [row["loss"] for row in rows] == [row["loss"] for row in history(place / "cut")]
    changed = call("train", "--config", recipe(place), "--out", place / "cut", "--resume", "--learning-rate", 1)
    assert changed.code == 2


def test_the_question_of_the_first_captioning_task_becomes_the_default(place: Path) -> None:
    path = recipe(place, max_steps=3)
    sections = tomllib.loads(path.read_text())
    say, sort, fill = sections["task"]
    sections["task"] = [sort, say | {"question": "what is here?"}, fill, say | {"name": "more"}]
    path.write_text(tomli_w.dumps(sections))
    done = call("train", "--config", path, "--out", place / "out")
    assert done.code == 0, done.err
    assert json.loads((place / "out" / "config.json").read_text())["question"] == "what is here?"
    assert "| more | `what is here?` |" in (place / "out" / "README.md").read_text()
    captioner = Captioner.load(str(place / "out"), device="cpu").core
    default, same, other = (
        captioner.settings(GenerationOptions(), prompt).encoder_ids for prompt in (None, "what is here?", QUESTION)
    )
    assert default == same != other


def test_rare_tasks_long_answers_and_missing_validation_are_reported_at_the_start(place: Path) -> None:
    path = recipe(place, max_steps=1)
    sections = tomllib.loads(path.read_text())
    for table in sections["task"]:
        table.pop("val_fraction", None)
    sections["task"][1] |= {"weight": 1e-308, "data": str(place / "classes" / "train")}
    sections["task"][2]["weight"] = 1e308
    sections["model"]["max_length"] = 4
    path.write_text(tomli_w.dumps(sections))
    done = call("train", "--config", path, "--out", place / "out")
    assert done.code == 0, done.err
    assert "task sort is drawn 0 times in an epoch of " in done.err
    assert "no validation images (give a [[task]] val_fraction or val_data)" in done.err
    assert "answers are longer than --max-length (4 tokens)" in done.err


def test_the_trained_folder_captions_classifies_and_fills_gaps(place: Path) -> None:
    done = train(place, "out", mask_patches=0.5, max_steps=2)
    assert done.code == 0, done.err
    photos = place / "classes" / "val" / "deep red"
    for prompt in ((), ("--prompt", "which colour?"), ("--prompt", "a <extra_id_0> on grey")):
        result = call("caption", photos, "--model", place / "out", "-o", "-", "--device", "cpu", *prompt)
        assert result.code == 0, result.err
    model = AutoModel.from_pretrained(place / "out")
    assert type(model).__name__ == "VisionT5"
    vocabulary = json.loads((place / "out" / "tokenizer.json").read_text())
    added = {token["content"]: token for token in vocabulary["added_tokens"]}
    assert {"<loc_0>", "<loc_2>", "<extra_id_0>", "<extra_id_99>"} <= added.keys()
    assert not added["<loc_0>"]["special"], "location tokens stay in the caption"
    assert model.config.text_config.vocab_size > max(token["id"] for token in added.values())


def train_tasks(place: Path, tasks: Any, **model: Any) -> Ended:
    path = recipe(place)
    sections = tomllib.loads(path.read_text())
    sections["task"], sections["model"] = tasks, sections["model"] | model
    path.write_text(tomli_w.dumps(sections))
    return call("train", "--config", path, "--out", place / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wieght": 2}, "did you mean weight"),
        ({"kind": "caption it"}, "it must be caption, classify or masked"),
        ({"weight": -1}, "it must be a number above 0"),
        ({"kind": "masked", "question": "what?"}, "leave question out"),
        ({"label_template": "a photo"}, "it must contain {label}"),
        ({"data": []}, "nothing to train on"),
        ({"name": ""}, "it must be a text"),
        ({"data": 5}, "data of a task is 5; it must be a text in quotes, or a list of them"),
        ({"val_fraction": "half"}, "it must be a number"),
        ({"image_root": 1}, "it must be a text in quotes"),
    ],
)
def test_a_wrong_task_is_refused(place: Path, changes: dict[str, Any], words: str) -> None:
    done = train_tasks(place, [{"name": "say", "data": str(place / "pictures" / "captions.txt")} | changes])
    assert done.code == 2
    assert words in done.err
    assert not (place / "out").exists()


def test_tasks_and_options_that_exclude_each_other_are_refused(place: Path) -> None:
    task = {"name": "say", "data": str(place / "pictures" / "captions.txt")}
    assert "two tasks have the same name" in train_tasks(place, [task, task]).err
    assert "a task has no name" in train_tasks(place, [{"data": "x"}]).err
    assert (
        "reads no question, so it learns only one task" in train_tasks(place, [task], decoder=GPT2, extra_tokens=0).err
    )
    assert "tables of the file that --config names" in call("train", "--task", "x", "--out", place / "out").err
    path = recipe(place, select="cider")
    path.write_text(path.read_text().replace('name = "say"', 'name = "say"\nkind = "masked"'))
    assert "needs a task of kind caption" in call("train", "--config", path, "--out", place / "out").err
    for flags, words in (
        (("--val-fraction", 0.1), "--val-fraction is given for the whole run"),
        (("--label-template", "{label}"), "--label-template is given for the whole run"),
        (("--train-limit", 3), "put it into the [[task]] tables"),
        (("--tags-column", "tags"), "tasks read no tags: leave it out"),
    ):
        refused = call("train", "--config", recipe(place), "--out", place / "out", *flags)
        assert (refused.code, words in refused.err) == (2, True), refused.err
    path = recipe(place, schedule="reduce_lr_on_plateau")
    path.write_text(path.read_text().replace("val_fraction = 0.25", "").replace("classes", "classes/train"))
    assert "give a [[task]] val_fraction or val_data" in call("train", "--config", path, "--out", place / "out").err
    both = call("train", "--config", recipe(place), "--data", place / "pictures", "--out", place / "out")
    assert "each task names its own data" in both.err


def save_t5(folder: Path, *, gated: bool, vocabulary: int = 260) -> T5ForConditionalGeneration:
    """A T5 with a SentencePiece tokenizer; gated means v1.1: a gated activation and an untied head."""
    save_pieces(folder)
    torch.manual_seed(5)
    style = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if gated else {}
    values = {name: value for name, value in T5.items() if name != "model_type"} | style
    model = T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, **values))
    if gated:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(vocabulary, 24))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("gated", [False, True])
def test_a_t5_keeps_its_weights_and_gets_missing_embeddings(tmp_path: Path, gated: bool) -> None:
    original = save_t5(tmp_path / "t5", gated=gated)
    encoder = save_encoder(tmp_path / "encoder", "swinv2")
    parts = {
        "encoder": str(tmp_path / "encoder"),
        "decoder": str(tmp_path / "t5"),
        "tokenizer": None,
        "vocab_size": 15000,
    }
    assembled = new(**parts, extra_tokens=40, question_encoder=str(tmp_path / "t5"))
    model: Any = assembled.model
    assert "decoder" not in assembled.new
    assert assembled.specials.start == assembled.specials.pad == model.generation_config.decoder_start_token_id
    ours = model.text_model
    assert torch.equal(ours.shared.weight[:260], original.shared.weight)
    assert torch.equal(ours.lm_head.weight[:260], original.lm_head.weight)
    assert (ours.lm_head.weight is ours.shared.weight) == (not gated)
    assert ours.config.scale_decoder_outputs == (not gated)
    assert torch.equal(
        model.question_encoder.encoder.block[0].layer[0].SelfAttention.q.weight,
        (original.encoder.block[0].layer[0].SelfAttention.q.weight),
    )
    assert torch.equal(model.encoder.embeddings.norm.weight, encoder.base_model.embeddings.norm.weight)
    assert len(gaps_of(assembled.tokenizer)) == 100
    ids = assembled.tokenizer("a <loc_39> dog", add_special_tokens=False)["input_ids"]
    assert assembled.tokenizer.decode(ids) == "a <loc_39> dog"
    assert ours.shared.num_embeddings > max(ids)
    model.save_pretrained(tmp_path / "whole")
    again = AutoModel.from_pretrained(tmp_path / "whole")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_question_encoder_needs_a_t5(tmp_path: Path) -> None:
    path = write_json(tmp_path / "t5.json", T5)
    paint_data(tmp_path / "pictures")
    parts = ("--encoder", write_json(tmp_path / "vit.json", VIT), "--decoder", write_json(tmp_path / "gpt2.json", GPT2))
    data = ("--data", tmp_path / "pictures" / "captions.txt", "--out", tmp_path / "out", "--tokenizer", "new")
    done = call("train", *parts, *data, "--question-encoder", path)
    assert done.code == 2
    assert "--question-encoder needs a T5 as decoder" in done.err


def test_a_question_encoder_shares_the_vocabulary_or_gets_new_embeddings(tmp_path: Path) -> None:
    save_t5(tmp_path / "t5", gated=False)
    save_t5(tmp_path / "other", gated=False)
    save_pieces(tmp_path / "other", CAPTIONS[:3], vocab_size=60)
    save_t5(tmp_path / "mute", gated=False, vocabulary=900)
    (tmp_path / "mute" / "spiece.model").unlink()
    parts = {"decoder": str(tmp_path / "t5"), "tokenizer": None, "vocab_size": 15000}
    for reader in ("other", "mute"):
        with pytest.raises(
            UsageError, match=rf"{reader} has another vocabulary than .*t5: give one with the same vocabulary"
        ):
            new(**parts, question_encoder=str(tmp_path / reader))
    original = T5ForConditionalGeneration.from_pretrained(tmp_path / "other")
    renewed = new(decoder=str(tmp_path / "t5"), question_encoder=str(tmp_path / "other"))
    reader: Any = renewed.model.question_encoder
    words = reader.get_input_embeddings().weight
    assert words is reader.encoder.embed_tokens.weight
    assert len(words) >= len(renewed.tokenizer)
    assert not any(torch.equal(words[i], original.shared.weight[i]) for i in range(260))
    assert renewed.new == {"encoder", "embeddings", "question-embeddings"}
    assert any("the question encoder's embeddings are new" in note for note in renewed.notes)
    kept = new(decoder=T5, tokenizer=str(tmp_path / "other"), question_encoder=str(tmp_path / "other"))
    assert torch.equal(kept.model.question_encoder.shared.weight[:260], original.shared.weight)
    fresh = new(decoder=str(tmp_path / "t5"), question_encoder=T5)
    assert "the question encoder has new random weights" in fresh.notes
    for assembled in (renewed, fresh):
        with pytest.raises(UsageError, match="freeze is encoder, but the question encoder"):
            refuse_freezing("encoder", assembled.new - {"encoder"})
        refuse_freezing("decoder", assembled.new)


def test_a_t5_is_trained_with_a_resnet(tmp_path: Path) -> None:
    encoder = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    data = paint_data(tmp_path / "pictures")
    parts = ("--encoder", write_json(tmp_path / "r.json", encoder), "--decoder", write_json(tmp_path / "t.json", T5))
    done = call("train", *parts, "--data", data, "--val-fraction", 0.25, "--out", tmp_path / "out", *SHORT)
    assert done.code == 0, done.err
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.image_projection.in_features == 32
    result = call("caption", tmp_path / "pictures", "--model", tmp_path / "out", "-o", "-", "--max-new-tokens", 4)
    assert result.code == 0, result.err
    assert len(result.rows) == 12


def test_one_task_is_trained_from_flags_with_a_question_encoder(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    parts = {"encoder": ENCODER, "decoder": T5, "question-encoder": T5 | {"d_model": 12, "d_kv": 6}}
    given = [
        word for name, part in parts.items() for word in (f"--{name}", write_json(tmp_path / f"{name}.json", part))
    ]
    flags = (*SHORT, "--freeze", "none", "--gradient-checkpointing")
    done = call("train", *given, "--data", data, "--val-fraction", 0.25, "--out", tmp_path / "out", *flags)
    assert done.code == 0, done.err
    assert AutoModel.from_pretrained(tmp_path / "out").question_encoder.config.d_model == 12
    result = call("caption", tmp_path / "pictures", "--model", tmp_path / "out", "-o", "-", "--max-new-tokens", 4)
    assert result.code == 0, result.err
    assert len(result.rows) == 12
