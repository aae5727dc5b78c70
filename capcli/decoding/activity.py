"""What the decode loops of a run do at the moment, for its display. Other threads read it while the loops change it."""

from __future__ import annotations

import threading
import time


class Activity:
    """How many images the decode loops of a run are `encoding` and `decoding`."""

    def __init__(self) -> None:
        self.encoding = 0
        self.decoding = 0
        self._lock = threading.Lock()
        self._begun = False
        self._longest = 0  # tokens of the captions so far
        self._loops: list[LoopActivity] = []

    @property
    def stage(self) -> str:
        """`reading` before the first image is encoded; `encoding` or `decoding` where only one happens, else `captioning`."""
        if not self._begun:
            return "reading"
        if bool(self.encoding) == bool(self.decoding):
            return "captioning"
        return "encoding" if self.encoding else "decoding"

    @property
    def under_way(self) -> int:
        return self.encoding + self.decoding

    @property
    def seconds_left(self) -> float | None:
        """About how many seconds the images under way take; None where no loop has decoded a token yet.

        Captions are taken to be as long as the longest so far.
        """
        left = [loop.seconds_left(self._longest) for loop in list(self._loops)]
        return max((seconds for seconds in left if seconds is not None), default=None)

    def loop(self, most: int) -> LoopActivity:
        """The activity of one more loop, whose captions have at most `most` tokens."""
        loop = LoopActivity(self, most)
        self._loops.append(loop)
        return loop

    def change(self, *, encoding: int = 0, decoding: int = 0, tokens: int = 0) -> bool:
        """Adds to the counts; `tokens` is the length of a finished caption. Returns whether it is the first change."""
        with self._lock:
            first, self._begun = not self._begun, True
            self.encoding += encoding
            self.decoding += decoding
            self._longest = max(self._longest, tokens)
        return first


class LoopActivity:
    """One decode loop's part of an activity, with the durations of its last chunk and its last step."""

    def __init__(self, activity: Activity, most: int) -> None:
        self._activity, self._most = activity, most
        self._since = 0  # steps since images were admitted
        self._encoding_since: float | None = None
        self._chunk_seconds = 0.0
        self._step_seconds: float | None = None

    def encodes(self, images: int) -> bool:
        """The loop encodes `images` more. Returns whether they are the first of the run."""
        self._encoding_since = time.monotonic()
        return self._activity.change(encoding=images)

    def admitted(self, images: int) -> None:
        """`images` are encoded, and decoded from now on."""
        if self._encoding_since is not None:
            self._chunk_seconds = time.monotonic() - self._encoding_since
        self._encoding_since, self._since = None, 0
        self._activity.change(encoding=-images, decoding=images)

    def stepped(self, seconds: float) -> None:
        self._since += 1
        self._step_seconds = seconds

    def finished(self, images: int, tokens: int) -> None:
        """The captions of `images` have ended, the longest with `tokens` tokens."""
        self._activity.change(decoding=-images, tokens=tokens)

    def dropped(self, *, encoding: int, decoding: int) -> None:
        """Images that were being encoded and decoded start again from their pixels."""
        self._activity.change(encoding=-encoding, decoding=-decoding)

    def seconds_left(self, longest: int) -> float | None:
        """About how many seconds the loop's images take if no more are taken; `longest` is that of captions so far, or 0."""
        if self._step_seconds is None:
            return None
        tokens = longest or self._most
        if self._encoding_since is None:
            return max(1, tokens - self._since) * self._step_seconds
        encoded = max(0.0, self._encoding_since + self._chunk_seconds - time.monotonic())
        return encoded + tokens * self._step_seconds
