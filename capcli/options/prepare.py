"""Options of `capcli prepare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from capcli.errors import UsageError
from capcli.options.caption import DECODE_TIMEOUT, MAX_PIXELS
from capcli.options.data import DataOptions
from capcli.options.limits import NonNegativeInt, PositiveFloat, PositiveInt, Range, check_limits
from capcli.text import flag

ImageFormat = Literal["jpeg", "png", "webp"]


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """How images are downloaded.

    At most `connections` requests run at a time, at most `per_host` of them to one host. Each attempt may take `timeout`
    seconds and `max_bytes` bytes. After an error that may be temporary there are `retries` more attempts: the first after
    `backoff` seconds, the next after twice that, and so on, or when the server allows it.
    """

    connections: PositiveInt = 64
    per_host: PositiveInt = 8
    retries: NonNegativeInt = 2
    timeout: PositiveFloat = 60.0
    max_bytes: PositiveInt = 64 << 20
    backoff: float = 1.0

    def __post_init__(self) -> None:
        check_limits(self, written=lambda name: "--download-timeout" if name == "timeout" else flag(name))


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """Store a compact copy of the images and captions of `data` in the folder `out`.

    Images are resized until their shorter edge has `edge` pixels (smaller images keep their size) and encoded as `format`
    with `quality` (None: 95 for jpeg and webp; png has none). A file contains `shard_size` images. With `url_column` the
    data are tables, and that column contains the URL of each image. `workers` None: one per CPU. `overwrite` starts from
    scratch, `retry_failed` tries images again that failed in earlier runs.
    """

    data: DataOptions
    out: str
    url_column: str | None = None
    edge: Annotated[int, Range(1, 16_383)] = 256
    format: ImageFormat = "jpeg"
    quality: Annotated[int, Range(1, 100)] | None = None
    shard_size: Annotated[int, Range(1, 10**9)] = 1000
    max_pixels: PositiveInt = MAX_PIXELS
    download: DownloadOptions = field(default_factory=DownloadOptions)
    decode_timeout: PositiveFloat = DECODE_TIMEOUT
    workers: NonNegativeInt | None = None
    overwrite: bool = False
    retry_failed: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.data.data:
            raise UsageError("no data: name annotations or a folder with --data")
        if self.overwrite and self.retry_failed:
            raise UsageError(
                "--overwrite tries all images again, --retry-failed only those that failed: give one of them"
            )
        if not self.out:
            raise UsageError("--out is empty: name a folder")
        if self.quality is not None and self.format == "png":
            raise UsageError("PNG is lossless and has no quality: leave --quality out")
        if self.url_column is not None and (self.data.image_column or self.data.image_root):
            raise UsageError("--url-column states where images are: leave --image-column and --image-root out")
