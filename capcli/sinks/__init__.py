"""The outputs of captions and failures: a file that a later run continues, standard output, text files beside images."""

from __future__ import annotations

from collections.abc import Callable

from capcli.options import SinkOptions
from capcli.sinks.sink import Sink
from capcli.sinks.stdout import ClosedPipeError

__all__ = ["ClosedPipeError", "Sink", "open_sink"]


def open_sink(options: SinkOptions, warn: Callable[[str], None]) -> Sink:
    """Lock the outputs of a run and read what earlier runs wrote. Nothing on disk changes before `Sink.begin`.

    Raises UsageError for outputs that cannot be written or that capcli did not write, CapcliError for outputs that are
    damaged or in use. `warn` is called with a line for a torn row that is cut off, for an image whose sidecar another
    image has, and for a failure that no file records.
    """
    sink = Sink(options, warn)
    try:
        sink.open()
    except BaseException:
        sink.close()
        raise
    return sink
