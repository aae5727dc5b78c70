"""The images that a proof is made with, where a folder of them is given."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from capcli import pixels
from capcli.errors import CapcliError, ImageError, UsageError
from capcli.export.parity import Pixels
from capcli.options import MAX_PIXELS, ExportOptions, SourceOptions
from capcli.pixels import PixelSpec
from capcli.progress import warn
from capcli.sources import open_source

MOST_VERIFIED = 64  # images of a folder given for the proof


def listed(options: ExportOptions) -> list[str]:
    """The images that `--verify-with` names. Raises UsageError for none."""
    if options.verify_with is None:
        return []
    source = open_source(SourceOptions(sources=(options.verify_with,)), warn, None)
    paths = [entry.path for entry in islice(source, MOST_VERIFIED)]
    if not paths:
        raise UsageError(f"--verify-with {options.verify_with}: there is no image")
    return paths


def loaded(paths: list[str], spec: PixelSpec, size: tuple[int, int]) -> list[Pixels]:
    """The images of a folder as the captioner sees them; broken ones are passed over. Raises CapcliError for none."""
    found = list(usable(paths, spec, size))
    if not found:
        raise CapcliError("--verify-with: none of its images can be used")
    return found


def usable(paths: list[str], spec: PixelSpec, size: tuple[int, int]) -> Iterator[Pixels]:
    for path in paths:
        try:
            image = pixels.load(path, spec, max_pixels=MAX_PIXELS)[0]
        except ImageError as error:
            warn(f"--verify-with: {path} is passed over: {error}")
            continue
        if image.shape[:2] == size:
            yield image
        else:
            warn(
                f"--verify-with: {path} is passed over: the processor leaves it at another size than the encoder takes"
            )
