"""The loss: every token of every caption once, the end too and padding never, however an update is cut into parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from captioners import pictures, values
from gradients import CAPTIONS, captioner, gradients, trainer_of
from running import environment

from capcli.training.model.assembly import AssembledCaptioner

LONGEST = 40


def sentence(made: AssembledCaptioner, text: str) -> list[int]:
    """What is learnt of a caption, by hand."""
    tokenizer = made.tokenizer
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)[: LONGEST - 1]
    return [*ids, tokenizer.eos_token_id]


def plain(folder: Path) -> dict[str, torch.Tensor]:
    """The gradients of transformers' own loss on all of it at once."""
    made = captioner(folder / "decoder")
    sentences = [sentence(made, text) for captions in CAPTIONS for text in captions]
    assert len(set(map(len, sentences))) > 3
    longest = max(map(len, sentences))
    labels = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in sentences])
    pixels = torch.cat([values(picture) for picture in pictures(len(CAPTIONS)) for _ in range(2)])
    made.model.train()
    made.model(pixel_values=pixels, labels=labels).loss.backward()
    return {name: w.grad for name, w in made.model.named_parameters() if w.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.01
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loss")


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, torch.Tensor]:
    return plain(place)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_accumulated_batches_teach_what_one_batch_does(
    place: Path, expected: dict[str, torch.Tensor], batch_size: int, accumulation: int
) -> None:
    assert_same(gradients(place, batch_size, accumulation), expected)


def test_two_processes_teach_what_one_does(place: Path, expected: dict[str, torch.Tensor]) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = Path(__file__).with_name("gradients.py")
    subprocess.run(
        [sys.executable, *launch, str(script), str(place), "2", "2"],
        env=environment(GOMP_SPINCOUNT="0"),
        check=True,
        timeout=100,
        capture_output=True,
    )
    assert_same(torch.load(place / "gradients.pt"), expected)


def test_every_caption_is_a_pair_with_its_end_and_without_padding(place: Path) -> None:
    made = captioner(place / "decoder")
    end = made.tokenizer.eos_token_id
    assert made.specials.pad == end
    trainer = trainer_of(place, made, 8, 1)
    sentences = [sentence(made, text) for captions in CAPTIONS for text in captions]
    (batch,) = trainer.get_train_dataloader()
    labels, read = batch["labels"].tolist(), batch["decoder_input_ids"].tolist()
    learnt = [[token for token in row if token != -100] for row in labels]
    assert sorted(learnt) == sorted(sentences)
    assert all(ids[-1] == end and end not in ids[:-1] for ids in learnt)
    for row, ids, seen, pixels in zip(labels, learnt, read, batch["pixel_values"], strict=True):
        assert row == ids + [-100] * (len(row) - len(ids))
        assert seen[: len(ids)] == [made.specials.start, *ids[:-1]]
        shown = pictures(len(CAPTIONS))[sentences.index(ids) // 2]
        assert pixels.tolist() == shown.tolist()
