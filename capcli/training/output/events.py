"""The events of a training run for TensorBoard.

PyTorch's SummaryWriter writes them in a thread, which prints a traceback and then blocks or raises when the disk is full. Here
an event is written when it is added, whole or not at all.
"""

from __future__ import annotations

import io
import os
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

from capcli.imports import cause, explain_import
from capcli.progress import warn as print_warning
from capcli.text import as_text, printable

VERSION = "brain.Event:2"  # of the format of the file


class EventFile:
    """A new file of events in `folder`, made with the first event.

    `after` is the step after which TensorBoard forgets the events of earlier files: that of the checkpoint of a resumed run.
    Nothing raises when the file cannot be written or TensorBoard cannot be imported: each different problem is passed to
    `warn` once.
    """

    def __init__(self, folder: str, *, after: int | None = None, warn: Callable[[str], None] = print_warning) -> None:
        self._warn, self._warnings = warn, set[str]()
        self._first: list[Any] = []
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from torch.utils.tensorboard import summary
        except Exception as error:  # whatever a package raises that does not fit the others
            self._summary = None
            self._warn(f"no events for TensorBoard: {explain_import(error) or cause(error)}")
            return
        self._event, self._summary = Event, summary
        name = (
            f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        )
        self._path, self._end = os.path.join(folder, name), 0
        self._first = [Event(wall_time=time.time(), file_version=VERSION)]
        if after is not None:
            start = SessionLog(status=SessionLog.START)
            self._first.append(Event(wall_time=time.time(), step=after + 1, session_log=start))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if self._summary is not None:
            self._add(self._summary.scalar(tag, value), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        if self._summary is not None:
            self._add(self._summary.text(tag, as_text(text)), step)

    def _add(self, summary: Any, step: int) -> None:
        events = [
            *(self._first if self._end == 0 else ()),
            self._event(wall_time=time.time(), step=step, summary=summary),
        ]
        try:
            self._append(b"".join(record(event.SerializeToString()) for event in events))
        except OSError as error:
            warning = f"{printable(self._path)} cannot be written ({error.strerror or error}); training continues"
            if warning not in self._warnings:
                self._warnings.add(warning)
                self._warn(warning)

    def _append(self, content: bytes) -> None:
        """Writes at the end of the last event, over what an earlier attempt may have left. Raises OSError."""
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "wb") as file:
            file.seek(self._end)
            try:
                file.write(content)
                file.flush()
            except OSError:
                os.ftruncate(descriptor, self._end)
                raise
            self._end += len(content)


def record(content: bytes) -> bytes:
    """An event in TensorBoard's file format, with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    out = io.BytesIO()
    RecordWriter(out).write(content)
    return out.getvalue()
