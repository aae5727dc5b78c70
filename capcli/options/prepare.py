"""What `capcli prepare` was asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from capcli.errors import UsageError
from capcli.options.caption import DECODE_TIMEOUT, MAX_PIXELS
from capcli.options.data import DataOptions

ImageFormat = Literal["jpeg", "png", "webp"]


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """How images are fetched from their addresses.

    At most `connections` at a time, `per_host` of them from one host. Each try may take `timeout` seconds and
    `max_bytes` bytes; what may be the moment's fault is tried `retries` times more, first after `backoff` seconds, then
    after twice that, and so on, or when the server says.
    """

    connections: int = 64
    per_host: int = 8
    retries: int = 2
    timeout: float = 60.0
    max_bytes: int = 64 << 20
    backoff: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("connections", 1), ("per_host", 1), ("retries", 0), ("max_bytes", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.timeout > 0:
            raise UsageError(f"timeout is {self.timeout}; it must be above 0")


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """One `capcli prepare`.

    Images of `data` are stored in `out` with their shorter edge at `edge` pixels, or as large as they are where that is
    less, as `format` at `quality` (None: 95 for jpeg and webp; png has none), `shard_size` to a file. With `url_column`
    the data are tables, and that column holds each image's address. `workers` None: as many as there are CPUs.
    `overwrite` starts a copy anew, `retry_failed` tries what failed in earlier runs again.
    """

    data: DataOptions
    out: str
    url_column: str | None = None
    edge: int = 256
    format: ImageFormat = "jpeg"
    quality: int | None = None
    shard_size: int = 1000
    max_pixels: int = MAX_PIXELS
    download: DownloadOptions = field(default_factory=DownloadOptions)
    decode_timeout: float = DECODE_TIMEOUT
    workers: int | None = None
    overwrite: bool = False
    retry_failed: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if not self.data.data:
            raise UsageError("no data: name annotations or a folder with --data")
        if self.overwrite and self.retry_failed:
            raise UsageError(
                "--overwrite tries all images again, and --retry-failed those that failed: give one of them"
            )
        if not self.out:
            raise UsageError("--out is empty: name a folder")
        for name, least, most in (("edge", 1, 16_383), ("shard_size", 1, 10**9)):
            if not least <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be between {least} and {most}")
        if self.format not in ("jpeg", "png", "webp"):
            raise UsageError(f"format is {self.format!r}; it must be jpeg, png or webp")
        if self.quality is not None and self.format == "png":
            raise UsageError("PNG loses nothing and has no quality: leave --quality out")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UsageError(f"quality is {self.quality}; it must be between 1 and 100")
        if self.url_column is not None and (self.data.image_column or self.data.image_root):
            raise UsageError("--url-column says where images are; --image-column and --image-root say it too")
