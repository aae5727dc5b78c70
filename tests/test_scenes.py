"""The drawn scenes: the same for a seed, never two alike, judged strictly; and the demo model gets them right."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL, PICTURES = EXAMPLES / "demo-model", EXAMPLES / "scenes"
PICTURES_SEED = 4  # of the pictures in examples/scenes

sys.path.insert(0, str(EXAMPLES))
scenes = importlib.import_module("scenes")

MANY = [scenes.make_scene(11, index) for index in range(300)]
ASPECTS = ("object", "colour", "count", "relation", "weather")


def judged(caption: str, scene: object) -> set[str]:
    verdict = scenes.judge(caption, scene)
    return {aspect for aspect in ASPECTS if getattr(verdict, aspect)}


def test_a_seed_gives_the_same_scene_on_every_machine() -> None:
    assert scenes.make_scene(7, 3) == scenes.Scene(
        key="7-3",
        first=scenes.Group("bird", "white", 3),
        relation="left",
        second=scenes.Group("bird", "purple", 1),
        weather="sunny",
    )
    assert (
        scenes.captions(scenes.make_scene(7, 3))[0] == "three white birds to the left of a purple bird on a sunny day"
    )


def test_a_scene_is_drawn_the_same_again() -> None:
    assert scenes.draw(MANY[0]).tobytes() == scenes.draw(MANY[0]).tobytes()


def test_no_two_are_alike() -> None:
    assert len({scenes.draw(scene, 96).tobytes() for scene in MANY}) == len(MANY)
    assert len({tuple(thing.frame for thing in scenes.place(scene)) for scene in MANY}) == len(MANY)


def test_another_seed_gives_other_scenes() -> None:
    assert scenes.draw(scenes.make_scene(1, 0)).tobytes() != scenes.draw(scenes.make_scene(2, 0)).tobytes()


def test_things_are_as_many_as_the_truth_says_and_within_the_picture() -> None:
    for scene in MANY:
        things = scenes.place(scene)
        assert len(things) == scene.first.count + scene.second.count
        assert all(0 <= part <= 1 for thing in things for part in thing.frame)


def middle(group: object, scene: object, axis: int) -> float:
    places = [t.frame for t in scenes.place(scene) if (t.kind, t.colour) == (group.kind, group.colour)]
    return sum(frame[axis] + frame[axis + 2] for frame in places) / 2 / len(places)


def test_things_stand_as_the_relation_says() -> None:
    for scene in MANY:
        if scene.relation == "left":
            assert middle(scene.first, scene, 0) < middle(scene.second, scene, 0)
        if scene.relation == "above":
            assert middle(scene.first, scene, 1) < middle(scene.second, scene, 1)
        if scene.relation == "front":
            assert middle(scene.first, scene, 1) > middle(scene.second, scene, 1)


def test_every_caption_is_right_for_its_scene() -> None:
    for scene in MANY:
        said = scenes.captions(scene)
        assert len(set(said)) == 5
        for caption in said:
            assert scenes.judge(caption, scene).right, caption


def altered(scene: object, aspect: str) -> object:
    """The scene with one thing about it untrue."""
    group = scene.second
    if aspect == "relation":
        return replace(scene, relation="above" if scene.relation == "left" else "left")
    if aspect == "object":
        return replace(scene, second=replace(group, kind="tree" if group.kind != "tree" else "house"))
    if aspect == "colour":
        return replace(scene, second=replace(group, colour="red" if group.colour != "red" else "blue"))
    return replace(scene, second=replace(group, count=group.count % 4 + 1))


@pytest.mark.parametrize("aspect", ["object", "colour", "count", "relation"])
def test_one_untrue_thing_is_wrong_and_only_that(aspect: str) -> None:
    for scene in MANY:
        for caption in scenes.captions(scene):
            assert judged(caption, altered(scene, aspect)) == set(ASPECTS) - {aspect}, caption


SCENE = scenes.Scene("k", scenes.Group("ball", "red", 2), "left", scenes.Group("house", "blue", 1), "rain")


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("two red balls to the left of a blue house", set()),
        ("a blue house to the right of two red balls in the rain", set()),
        ("on a rainy day, a blue house with two red balls to the left", set()),
        ("two red balls left of a blue house at night", {"weather"}),
        ("two red balls to the right of a blue house", {"relation"}),
        ("a blue house to the left of two red balls", {"relation"}),
        ("two blue balls to the left of a red house", {"colour"}),
        ("a red ball to the left of two blue houses", {"count"}),
        ("two red houses to the left of a blue ball", {"object"}),
        ("three red cats above a blue house", {"object", "count", "relation"}),
        ("two red ball to the left of a blue house", set(ASPECTS)),
        ("two red balls", set(ASPECTS)),
        ("two red balls to the left of a house", set(ASPECTS)),
        ("two red balls to the left of a blue house in the rain in the rain", set(ASPECTS)),
        ("two red balls to the left of a blue house and a cat", set(ASPECTS)),
        ("", set(ASPECTS)),
    ],
)
def test_the_judge_is_strict(caption: str, wrong: set[str]) -> None:
    assert judged(caption, SCENE) == set(ASPECTS) - wrong


def test_people_are_known_by_their_coats() -> None:
    scene = replace(SCENE, first=scenes.Group("person", "orange", 1))
    for words in ("a person in orange", "a person in an orange coat"):
        assert scenes.judge(f"{words} left of a blue house", scene).right


def test_the_command_writes_a_folder_that_loads(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "scenes.py"), str(tmp_path / "out"), "--count", "4", "--seed", "7"]
    subprocess.run([*command, "--format", "mixed"], check=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [row["file_name"] for row in rows] == [
        "scene-0000.jpg",
        "scene-0001.png",
        "scene-0002.webp",
        "scene-0003.jpg",
    ]
    for index, row in enumerate(rows):
        with Image.open(tmp_path / "out" / row["file_name"]) as picture:
            assert picture.convert("RGB").size == (scenes.PICTURE_SIZE, scenes.PICTURE_SIZE)
        assert row["text"] == row["captions"][0]
        assert all(scenes.judge(caption, scenes.make_scene(7, index)).right for caption in row["captions"])


def test_one_group_is_drawn_on_its_side_and_the_other_left_out(tmp_path: Path) -> None:
    scenes.write_folder(tmp_path, 6, 7, (".png",), sides=True)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text("utf-8").splitlines()]
    for index, row in enumerate(rows):
        scene = scenes.make_scene(7, index, ("left",))
        drawn, side = (scene.first, "left") if index % 2 else (scene.second, "right")
        said = {scenes.describe(random.Random(n), drawn) for n in range(8)}
        assert all(caption.partition(f" on the {side}")[0] in said for caption in row["captions"])
        places = [t.frame for t in scenes.place(scene) if (t.kind, t.colour) == (drawn.kind, drawn.colour)]
        assert len(places) == drawn.count
        assert all((left + right < 1) == (side == "left") for left, _, right, _ in places)
        with Image.open(tmp_path / row["file_name"]) as picture:
            shown = picture.convert("RGB").tobytes()
        assert shown != scenes.draw(scene).tobytes()
        assert shown == scenes.draw(scene, without=scene.second if index % 2 else scene.first).tobytes()


def test_the_demo_model_captions_its_pictures_right_and_ends_by_itself() -> None:
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(MODEL).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(MODEL), AutoImageProcessor.from_pretrained(MODEL)
    rows = [json.loads(line) for line in (PICTURES / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 24
    for index, row in enumerate(rows):
        with Image.open(PICTURES / row["file_name"]) as picture, torch.inference_mode():
            ids = model.generate(**processor(picture.convert("RGB"), return_tensors="pt"))[0].tolist()
        caption = tokenizer.decode(ids, skip_special_tokens=True)
        assert scenes.judge(caption, scenes.make_scene(PICTURES_SEED, index)).right, (row["file_name"], caption)
        assert ids[-1] == tokenizer.eos_token_id


def test_the_demo_model_is_small_and_says_nothing_of_where_it_was_made() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 12_000_000
    config = json.loads((MODEL / "config.json").read_text("utf-8"))
    assert not any(part.get("_name_or_path") for part in (config, config["encoder"], config["decoder"]))
