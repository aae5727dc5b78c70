"""How good a captioner is at each of several tasks: losses and figures by the task's name, and of all together the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from capcli.captioning.captioner import Captioner
from capcli.models.encoder_text import fillings
from capcli.training.data.mixing import TaskMixture
from capcli.training.data.pairs import Collate
from capcli.training.loop.validation import Prepare, Validation, mean_loss

CAPTION, CLASSIFY, MASKED = "caption", "classify", "masked"


@dataclass(frozen=True)
class Validations:
    """A validation of each task, by name, and the kind of each. `pairs` are those of all.

    Scores of the first task that captions have their usual names, for the best may be chosen by them.
    """

    pairs: TaskMixture
    collate: Collate
    tasks: Mapping[str, Validation]
    kinds: Mapping[str, str]

    @property
    def captioned(self) -> list[str]:
        return [f"{name} {number}" for name, each in self.tasks.items() for number in each.captioned]

    def losses(self, model: Any, prepare: Prepare, accelerator: Accelerator) -> dict[str, float]:
        """Of all tokens of all tasks, and of each task's. Raises CapcliError when no image can be loaded."""
        sums = {name: each.sums(model, prepare, accelerator) for name, each in self.tasks.items()}
        total, count = map(sum, zip(*sums.values(), strict=True))
        return {"loss": mean_loss(total, count)} | {f"{name}_loss": mean_loss(*each) for name, each in sums.items()}

    def captions(
        self, captioner: Captioner, accelerator: Accelerator, progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        """The answers, by the name of the task and the image's number."""
        said: dict[str, str] = {}
        whole = len(self.captioned)
        for name, each in self.tasks.items():
            before = len(said)
            found = each.captions(captioner, accelerator, lambda done, _: progress(before + done, whole))  # noqa: B023
            said |= {f"{name} {number}": text for number, text in found.items()}
        return said

    def scores(self, captions: Mapping[str, str]) -> dict[str, float]:
        """Captions are scored as ever; of labels the share that is right is told, and of gaps."""
        return dict(self._scores(captions))

    def _scores(self, captions: Mapping[str, str]) -> Iterator[tuple[str, float]]:
        usual = True
        for name, each in self.tasks.items():
            said = {str(n): captions[key] for n in each.captioned if (key := f"{name} {n}") in captions}
            if not said:
                continue
            if self.kinds[name] == CLASSIFY:
                yield f"{name}_accuracy", sum(right(said[n], each.references[n]) for n in said) / len(said)
            elif self.kinds[name] == MASKED:
                gaps = [found for n in said for found in restored(said[n], each.references[n][0])]
                yield f"{name}_restored", sum(gaps) / max(len(gaps), 1)
            else:
                yield from ((n if usual else f"{name}_{n}", value) for n, value in each.scores(said).items())
                usual = False

    def samples(self, captions: Mapping[str, str], count: int) -> list[tuple[str, str, str]]:
        """Some images of each task, with the answer and the right one."""
        shown = []
        for name, each in self.tasks.items():
            own = {key.removeprefix(f"{name} "): text for key, text in captions.items() if key.startswith(f"{name} ")}
            shown += each.samples(own, count)
        return shown


def right(said: str, references: Any) -> bool:
    """Whether an answer is one of those that are right; how it is spaced is the tokenizer's affair."""
    return "".join(said.split()) in {"".join(text.split()) for text in references}


def restored(said: str, reference: str) -> list[bool]:
    """Of each gap, whether exactly its words came back. Behind the last words the right answer has one gap more, of none."""
    found = fillings(said)
    return [right(found.get(gap, ""), (words,)) for gap, words in fillings(reference).items() if words]
