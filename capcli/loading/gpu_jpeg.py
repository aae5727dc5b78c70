"""JPEGs decoded and resized on a GPU, in batches, in a thread between the decoder processes and the decode loop."""

from __future__ import annotations

import io
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty, Full, Queue, SimpleQueue
from types import TracebackType
from typing import Protocol, Self, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from capcli import pixels
from capcli.errors import CapcliError, UsageError
from capcli.imports import importing
from capcli.interrupts import Interrupts
from capcli.loading import Decode, Loading
from capcli.options import MAX_PIXELS
from capcli.pixels import PixelSpec
from capcli.pixels.processor import BICUBIC, BILINEAR
from capcli.records import Entry, Failure, Loaded

MOST, MOST_BYTES = 128, 32 << 20  # files in a batch, and their bytes; decoded they are ten times as large, or more
POLL_SECONDS = 0.2  # seconds between two checks of whether to end
FILTERS = {BILINEAR: "bilinear", BICUBIC: "bicubic"}  # Pillow's numbers, PyTorch's names
TRIED, TRIED_SIZE = 64, (640, 480)  # JPEGs that compare the GPU with decoder processes, and their (width, height)

Bytes = npt.NDArray[np.uint8]
Decoder = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # files, uint8 [n] each -> images, uint8 [3, h, w]


class Start(Protocol):
    """`capcli.loading.load` with its numeric arguments bound."""

    def __call__(self, entries: Iterable[Entry], decode: Decode) -> Loading: ...


def refuse_gpu_decode(spec: PixelSpec, device: torch.device) -> None:
    """Raises UsageError where the device or the processor is not supported, CapcliError where torchvision is missing."""
    if device.type != "cuda":
        raise UsageError(f"--gpu-decode is for CUDA, and this run is on the {device.type.upper()}: leave it out")
    if spec.canvas is not None:
        raise UsageError("--gpu-decode does not pad images, and this model's processor does: leave it out")
    if spec.rule != "keep" and spec.resample not in FILTERS:
        name = Image.Resampling(spec.resample).name.lower()
        raise UsageError(
            f"--gpu-decode resizes bilinear or bicubic, and this model's processor uses {name}: leave it out"
        )
    missing = "--gpu-decode needs torchvision: pip install 'capcli[gpu-decode]', or leave it out"
    with importing(
        "torchvision", "torchvision", missing, "pip install --force-reinstall torchvision, or leave out --gpu-decode"
    ):
        import torchvision.io  # noqa: F401


def nvjpeg(device: torch.device) -> Decoder:
    """torchvision's decoder on a CUDA device; it raises RuntimeError for the whole batch if one file cannot be decoded."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(files: Sequence[Tensor]) -> Sequence[Tensor]:
        images: Sequence[Tensor] = decode_jpeg(list(files), mode=ImageReadMode.RGB, device=device)
        return images

    return decode


class GpuJpegDecoder:
    """Files of plain JPEGs to pixels uint8 [height, width, 3], as `pixels.load` gives them.

    Small differences remain: rounding, and how a decoder interpolates subsampled chroma.
    """

    def __init__(self, spec: PixelSpec, decode: Decoder, stream: torch.cuda.Stream | None = None) -> None:
        self.spec, self._decode, self._stream = spec, decode, stream

    @classmethod
    def on(cls, device: torch.device, spec: PixelSpec) -> GpuJpegDecoder:
        """With nvJPEG on a CUDA device, on a stream other than that of the decode loop's steps."""
        return cls(spec, nvjpeg(device), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    def __call__(self, files: Sequence[Bytes]) -> list[Bytes | None]:
        """The pixels of each file; None where the GPU cannot decode it or returns a single colour."""
        try:
            images = self.decode_batch(files)
        except Exception:  # one file is damaged, or there is not enough memory: the error does not distinguish these
            if len(files) == 1:
                return [None]
            half = len(files) // 2
            return [*self(files[:half]), *self(files[half:])]
        # hardware decoders sometimes skip an image without an error
        return [None if image.min() == image.max() else image for image in images]

    def decode_batch(self, files: Sequence[Bytes]) -> list[Bytes]:
        """The pixels of all files; raises what the decoder raises."""
        with torch.cuda.stream(self._stream):
            images = self._decode([torch.from_numpy(file) for file in files])
            return [resized(image, self.spec).cpu().numpy() for image in images]


def resized(image: Tensor, spec: PixelSpec) -> Tensor:
    """uint8 [3, h, w] of any size, resized and cropped as the processor does: uint8 [height, width, 3].

    Two passes in Pillow's order, each rounded to bytes. A few values differ from Pillow's by 1, very few by 2.
    """
    height, width = image.shape[1:]
    size = spec.resized(height, width)
    first = (size[0], width) if pixels.columns_first((width, height), size[::-1]) else (height, size[1])
    for whole in (first, size):
        if whole != tuple(image.shape[1:]):
            # contiguous: the order of summation must not depend on the decoder's memory layout
            wide = F.interpolate(image[None].float().contiguous(), whole, mode=FILTERS[spec.resample], antialias=True)
            image = wide[0].round_().clamp_(0, 255).to(torch.uint8)
    crop = spec.crop or size
    (top, rows, above), (left, columns, before) = (pixels.window(*each) for each in zip(size, crop, strict=True))
    part = image[:, top : top + rows, left : left + columns].permute(1, 2, 0)
    if (rows, columns) == crop:
        return part.contiguous()
    padded = part.new_zeros(*crop, 3)
    padded[above : above + rows, before : before + columns] = part
    return padded


def rates(jpegs: GpuJpegDecoder) -> tuple[float, float]:
    """Images per second of `jpegs` and of one decoder process, measured with a generated JPEG.

    Raises CapcliError where the GPU cannot decode it.
    """
    draw = np.random.default_rng(0)
    fields = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(TRIED_SIZE)
    noise = draw.integers(-12, 13, (*TRIED_SIZE[::-1], 1))
    stream = io.BytesIO()
    Image.fromarray((np.asarray(fields) + noise).clip(0, 255).astype(np.uint8)).save(stream, "jpeg", quality=90)
    file = stream.getvalue()
    files = [np.frombuffer(file, np.uint8).copy()] * TRIED
    try:
        jpegs.decode_batch(files)  # warm-up: libraries initialise
        began = time.perf_counter()
        jpegs.decode_batch(files)
    except Exception as error:
        raise CapcliError(f"--gpu-decode: torchvision decodes no JPEG on this GPU ({error}); leave it out") from error
    between = time.perf_counter()
    for _ in range(TRIED // 8):
        pixels.load(file, jpegs.spec, max_pixels=MAX_PIXELS)
    return TRIED / (between - began), TRIED // 8 / (time.perf_counter() - between)


class GpuLoading:
    """`Loading` in which a GPU decodes the plain JPEGs: results in the entries' order, each as soon as all before it are ready.

    Decoder processes read all files with `keep`, which returns plain JPEGs undecoded. Those that `jpegs` cannot decode go
    to decoder processes once more, with `whole`. `start(entries, decode)` starts the processes.
    """

    def __init__(
        self, entries: Iterable[Entry], jpegs: GpuJpegDecoder, keep: Decode, whole: Decode, start: Start
    ) -> None:
        self._jpegs = jpegs
        self._entries: deque[Entry] = deque()  # read, and not taken from `_loading` yet
        self._loading = start(self._recorded(entries), keep)
        self._ready: Queue[Loaded | Failure | BaseException | None] = Queue(2 * MOST)
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._fallback = Fallback(partial(start, decode=whole), self._closed)
        self._thread = threading.Thread(target=self._work, name="capcli-gpu-decode", daemon=True)
        self.done = False
        self._thread.start()

    def take(self, timeout: float | None = None) -> Loaded | Failure | None:
        """The next result. None: nothing within `timeout` seconds (None: no limit), or all is `done`."""
        if self.done:
            return None
        try:
            result = self._ready.get(timeout != 0, timeout)
        except Empty:
            return None
        if result is None or isinstance(result, BaseException):
            self.done = True
            if result is not None:
                raise result
            return None
        return result

    def close(self) -> None:
        """End the processes, and the thread once the GPU has decoded its batch."""
        self._closed.set()
        self._loading.close()
        # A second Ctrl-C must not end the interpreter while the thread computes: it would abort.
        with Interrupts(quiet=True, grace=math.inf):
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recorded(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            self._entries.append(entry)
            yield entry

    def _work(self) -> None:
        try:
            while self._error is None and not (self._closed.is_set() or self._loading.done):
                for result in self._decoded(self._gathered()):
                    self._put(result)
        except BaseException as error:  # the thread that takes raises it
            self._error = error
        finally:
            self._fallback.close()
        self._put(self._error)

    def _gathered(self) -> list[tuple[Entry, Loaded | Failure]]:
        """The results that are ready, at most a batch; if there are none, the first within POLL_SECONDS."""
        gathered: list[tuple[Entry, Loaded | Failure]] = []
        size = 0
        while len(gathered) < MOST and size < MOST_BYTES:
            try:
                result = self._loading.take(0 if gathered else POLL_SECONDS)
            except Exception as error:  # raised after the results before it
                self._error = error
                break
            if result is None:
                break
            gathered.append((self._entries.popleft(), result))
            size += result.pixels.nbytes if isinstance(result, Loaded) else 0
        return gathered

    def _decoded(self, gathered: Sequence[tuple[Entry, Loaded | Failure]]) -> Iterator[Loaded | Failure]:
        files = [result.pixels for _, result in gathered if is_file(result)]
        images = iter(self._jpegs(files) if files else ())
        decoded: list[Loaded | Failure | None] = []
        for _, result in gathered:
            image = next(images) if is_file(result) else None
            decoded.append(result if not is_file(result) else None if image is None else replace(result, pixels=image))
        failed = [entry for (entry, _), result in zip(gathered, decoded, strict=True) if result is None]
        retried = self._fallback.load(failed)
        for each in decoded:
            final = next(retried, None) if each is None else each
            if final is not None:  # None once this is closed
                yield final

    def _put(self, result: Loaded | Failure | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(result, timeout=POLL_SECONDS)
                return
            except Full:
                continue


class Fallback:
    """Decodes in separate decoder processes what the GPU could not; they start when they are first needed."""

    def __init__(self, start: Callable[[Iterable[Entry]], Loading], closed: threading.Event) -> None:
        self._start, self._closed = start, closed
        self._queue: SimpleQueue[Entry | None] = SimpleQueue()
        self._loading: Loading | None = None

    def load(self, entries: Sequence[Entry]) -> Iterator[Loaded | Failure]:
        """One result for each entry, in their order; fewer once `closed` is set."""
        if entries and self._loading is None:
            self._loading = self._start(iter(self._queue.get, None))
        for entry in entries:
            self._queue.put(entry)
        for _ in entries:
            result = None
            while result is None and self._loading and not self._closed.is_set():
                result = self._loading.take(POLL_SECONDS)
            if result is not None:
                yield result

    def close(self) -> None:
        self._queue.put(None)
        if self._loading is not None:
            self._loading.close()


def is_file(result: Loaded | Failure) -> TypeGuard[Loaded]:
    """Whether the result is the bytes of a file."""
    return isinstance(result, Loaded) and result.pixels.ndim == 1
