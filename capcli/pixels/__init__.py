"""Image bytes -> upright RGB -> pixels, bit-identical to the model's image processor.

Decoder processes import this package: it needs the standard library, NumPy and Pillow, and imports pillow-heif only when
a file needs it. Pillow's limits and warnings are global to the process, so a process decodes one image at a time here.
"""

from capcli.pixels.copies import load_jpeg
from capcli.pixels.processor import PixelSpec
from capcli.pixels.reading import from_array, load, load_or_keep, load_whole, read, to_rgb, within
from capcli.pixels.resizing import columns_first, resize, window
from capcli.records import FACTS

__all__ = [
    "FACTS",
    "PixelSpec",
    "columns_first",
    "from_array",
    "load",
    "load_jpeg",
    "load_or_keep",
    "load_whole",
    "read",
    "resize",
    "to_rgb",
    "window",
    "within",
]
