"""Validation of a run with several tasks: loss and scores of each task, and the loss of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from capcli.captioning.slot_captioner import SlotCaptioner
from capcli.models.encoder_text import fillings
from capcli.training.data.mixing import TaskMixture
from capcli.training.data.pairs import Collate
from capcli.training.loop.validation import Prepare, Validation, mean_loss

CAPTION, CLASSIFY, MASKED = "caption", "classify", "masked"


@dataclass(frozen=True)
class Validations:
    """The validation data and the kind of each task, by its name; `pairs` of all tasks.

    The scores of the first captioning task have their usual names, by which the best checkpoint may be selected. All other
    names begin with the task's.
    """

    pairs: TaskMixture
    collate: Collate
    tasks: Mapping[str, Validation]
    kinds: Mapping[str, str]

    @property
    def captioned(self) -> list[str]:
        """Task and index of each image for which an answer is generated."""
        return [f"{name} {index}" for name, task in self.tasks.items() for index in task.captioned]

    def losses(self, model: Any, prepare: Prepare, accelerator: Accelerator) -> dict[str, float]:
        """`loss` over the tokens of all tasks, `TASK_loss` over those of each. Raises CapcliError if no image can be loaded."""
        sums = {name: task.sums(model, prepare, accelerator) for name, task in self.tasks.items()}
        total, count = map(sum, zip(*sums.values(), strict=True))
        return {"loss": mean_loss(total, count)} | {f"{name}_loss": mean_loss(*pair) for name, pair in sums.items()}

    def captions(
        self, captioner: SlotCaptioner, accelerator: Accelerator, progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        """The generated answers by task and index, as in `captioned`."""
        answers: dict[str, str] = {}
        total = len(self.captioned)
        for name, task in self.tasks.items():
            before = len(answers)
            found = task.captions(captioner, accelerator, lambda done, _: progress(before + done, total))  # noqa: B023
            answers |= {f"{name} {index}": text for index, text in found.items()}
        return answers

    def scores(self, captions: Mapping[str, str]) -> dict[str, float]:
        """The scores of captions, the share of correct labels (`TASK_accuracy`) and of correct gaps (`TASK_restored`)."""
        return dict(self._scores(captions))

    def _scores(self, captions: Mapping[str, str]) -> Iterator[tuple[str, float]]:
        first = True
        for name, task in self.tasks.items():
            answers = {str(n): captions[key] for n in task.captioned if (key := f"{name} {n}") in captions}
            if not answers:
                continue
            if self.kinds[name] == CLASSIFY:
                yield f"{name}_accuracy", sum(right(answers[n], task.references[n]) for n in answers) / len(answers)
            elif self.kinds[name] == MASKED:
                gaps = [correct for n in answers for correct in restored(answers[n], task.references[n][0])]
                yield f"{name}_restored", sum(gaps) / max(len(gaps), 1)
            else:
                yield from ((key if first else f"{name}_{key}", value) for key, value in task.scores(answers).items())
                first = False

    def samples(self, captions: Mapping[str, str], count: int) -> list[tuple[str, str, str]]:
        """Name, answer and reference of the first `count` images of each task."""
        samples = []
        for name, task in self.tasks.items():
            start = f"{name} "
            answers = {key.removeprefix(start): text for key, text in captions.items() if key.startswith(start)}
            samples += task.samples(answers, count)
        return samples


def right(answer: str, references: Any) -> bool:
    """Whether an answer equals one of the references except for spaces, which depend on the tokenizer."""
    return "".join(answer.split()) in {"".join(text.split()) for text in references}


def restored(answer: str, reference: str) -> list[bool]:
    """Whether the answer fills each gap correctly. A reference ends with one more gap, an empty one, which is left out."""
    found = fillings(answer)
    return [right(found.get(gap, ""), (words,)) for gap, words in fillings(reference).items() if words]
