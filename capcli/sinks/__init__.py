"""Where captions go: a file that a later run goes on with, standard output, sidecars; and where failures go."""

from __future__ import annotations

from collections.abc import Callable

from capcli.options import SinkOptions
from capcli.sinks.sink import Sink
from capcli.sinks.stdout import ClosedPipeError
from capcli.storage.run_file import difference

__all__ = ["ClosedPipeError", "Sink", "difference", "open_sink"]


def open_sink(options: SinkOptions, warn: Callable[[str], None]) -> Sink:
    """The outputs, locked and read; nothing on disk changes before `Sink.begin`.

    Raises UsageError for outputs that cannot be written or are not this command's, CapcliError for ones that are
    damaged or in use. `warn` hears a line for what is mended, for sidecars shared, and for failures that no file takes.
    """
    sink = Sink(options, warn)
    try:
        sink.open()
    except BaseException:
        sink.close()
        raise
    return sink
