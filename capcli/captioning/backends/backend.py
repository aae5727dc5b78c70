"""The interface of a backend: how the pipeline hands it images and gets captions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from capcli.captioning.feed import Arrivals, Deliver
from capcli.decoding.activity import Activity
from capcli.records import Entry
from capcli.sources import Source


class Backend(Protocol):
    """A backend that is set up for one run of `capcli caption`.

    The pipeline calls `plan` once, before the first image, then `prepared`, `load` and `caption` on the same entries.
    """

    @property
    def label(self) -> str:
        """How captions are made, for the closing line: "in float32"."""

    def settings(self) -> Mapping[str, Any]:
        """What captions depend on, for `settings` in the run file: a run continues only with equal settings."""

    def facts(self) -> Mapping[str, Any]:
        """Other keys of the run file, such as model, device, versions and batch shapes. They may change during the run."""

    def plan(self, wanted: Iterator[Entry], source: Source) -> Iterator[Entry]:
        """Choose what depends on the number of images. Returns an iterator over all of `wanted`; some may be read already."""

    def prepared(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """The entries with what the model reads beside the pixels, such as tags or a prompt from metadata files."""

    def load(self, entries: Iterable[Entry], facts: Collection[str]) -> AbstractContextManager[Arrivals]:
        """Start the processes that read and decode images, with these `facts` of each file. The context ends them."""

    def caption(
        self,
        arrivals: Arrivals,
        deliver: Deliver,
        *,
        stop: Callable[[], bool],
        changed: Callable[[], None],
        activity: Activity,
    ) -> Iterator[None]:
        """Caption all arrivals; `deliver(index, result)` is called for each, and `activity` is kept up to date.

        A generator that yields often, so that the caller can show progress. Once `stop()` is true no more images are
        taken, and those under way are finished. `changed()` is called when `facts` have changed. Raises UnfinishedError, after
        the last `deliver`, where the run cannot go on but what it has captioned is complete.
        """

    def notes(self) -> Iterable[str]:
        """Warnings for the end of the run, one line each."""
