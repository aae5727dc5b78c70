"""The loss counts every token of every caption once, with the end and without padding, however an update is split."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from captioners import pictures, values
from gradients import CAPTIONS, captioner, gradients, trainer_of
from running import environment
from training import exit_code

from capcli.training.loop.loss import token_loss
from capcli.training.model.assembly import AssembledCaptioner

MAX_LENGTH = 40


def expected_tokens(assembled: AssembledCaptioner, text: str) -> list[int]:
    """The token ids that a caption should be learnt as."""
    tokenizer = assembled.tokenizer
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)[: MAX_LENGTH - 1]
    return [*ids, tokenizer.eos_token_id]


def gradients_of_transformers(folder: Path) -> dict[str, torch.Tensor]:
    """The gradients of transformers' own loss over one batch of all captions."""
    assembled = captioner(folder / "decoder")
    sentences = [expected_tokens(assembled, text) for captions in CAPTIONS for text in captions]
    assert len(set(map(len, sentences))) > 3
    longest = max(map(len, sentences))
    labels = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in sentences])
    pixels = torch.cat([values(picture) for picture in pictures(len(CAPTIONS)) for _ in range(2)])
    assembled.model.train()
    assembled.model(pixel_values=pixels, labels=labels).loss.backward()
    return {name: w.grad for name, w in assembled.model.named_parameters() if w.grad is not None}


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
    return gradients_of_transformers(place)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_accumulated_batches_have_the_gradients_of_one_batch(
    place: Path, expected: dict[str, torch.Tensor], batch_size: int, accumulation: int
) -> None:
    assert_same(gradients(place, batch_size, accumulation), expected)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(place: Path, expected: dict[str, torch.Tensor]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    script = Path(__file__).with_name("gradients.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, place, "2", "2"], env=environment(**address, RANK=str(rank), LOCAL_RANK=str(rank))
        )
        for rank in (0, 1)
    ]
    assert [exit_code(process) for process in processes] == [0, 0]
    assert_same(torch.load(place / "gradients.pt"), expected)


def test_each_caption_is_learnt_with_its_end_and_without_padding(place: Path) -> None:
    assembled = captioner(place / "decoder")
    end = assembled.tokenizer.eos_token_id
    assert assembled.specials.pad == end
    trainer = trainer_of(place, assembled, 8, 1)
    sentences = [expected_tokens(assembled, text) for captions in CAPTIONS for text in captions]
    (batch,) = trainer.get_train_dataloader()
    labels, inputs = batch["labels"].tolist(), batch["decoder_input_ids"].tolist()
    learnt = [[token for token in row if token != -100] for row in labels]
    assert sorted(learnt) == sorted(sentences)
    assert all(ids[-1] == end and end not in ids[:-1] for ids in learnt)
    for row, ids, read, pixels in zip(labels, learnt, inputs, batch["pixel_values"], strict=True):
        assert row == ids + [-100] * (len(row) - len(ids))
        assert read[: len(ids)] == [assembled.specials.start, *ids[:-1]]
        picture = pictures(len(CAPTIONS))[sentences.index(ids) // 2]
        assert pixels.tolist() == picture.tolist()


def test_label_smoothing_spreads_a_share_of_the_target_over_all_tokens() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    log_probs = logits.log_softmax(-1)
    rows = [log_probs[0, 0], log_probs[0, 1], log_probs[0, 2], log_probs[1, 0]]
    of_targets = -sum(row[token] for row, token in zip(rows, (1, 2, 3, 4), strict=True))
    uniform = -sum(row.mean() for row in rows)
    outputs = type("Outputs", (), {"logits": logits})
    for share in (0.0, 0.3):
        expected = ((1 - share) * of_targets + share * uniform) / 4
        torch.testing.assert_close(token_loss(outputs, labels, label_smoothing=share), expected)
        torch.testing.assert_close(token_loss(outputs, labels, torch.tensor(8), label_smoothing=share), expected / 2)


def test_a_batch_without_loaded_images_has_a_loss_of_zero() -> None:
    outputs = type("Outputs", (), {"logits": torch.randn(2, 3, 7)})
    labels = torch.full((2, 3), -100)
    assert token_loss(outputs, labels, labels.ne(-100).sum()) == 0
