"""JPEGs decoded and resized on a GPU, many at a time, in a thread between loading and the decode loop."""

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
from capcli.interrupts import Interrupts
from capcli.loading import Decode, Loading
from capcli.options import MAX_PIXELS
from capcli.pixels import PixelSpec
from capcli.pixels.processor import BICUBIC, BILINEAR
from capcli.records import Entry, Failure, Loaded

MOST, MOST_BYTES = 128, 32 << 20  # files decoded at a time; decoded they are ten times as large, or more
POLL_SECONDS = 0.2  # seconds after which a wait looks whether it should end
FILTERS = {BILINEAR: "bilinear", BICUBIC: "bicubic"}  # Pillow's numbers, PyTorch's names
TRIED, TRIED_SIZE = 64, (640, 480)  # how many JPEGs, of which width and height, GPU and processes are compared by

Bytes = npt.NDArray[np.uint8]
Decoder = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # files, uint8 [n] each -> images, uint8 [3, h, w]


class Start(Protocol):
    """`capcli.loading.load`, its numbers given."""

    def __call__(self, entries: Iterable[Entry], decode: Decode) -> Loading: ...


def refuse_gpu_decode(spec: PixelSpec, device: torch.device) -> None:
    """Raises UsageError where a GPU cannot do what this processor asks for, CapcliError where torchvision is missing."""
    if device.type != "cuda":
        raise UsageError(f"--gpu-decode is for CUDA, and this run is on the {device.type.upper()}: leave it out")
    if spec.rule != "keep" and spec.resample not in FILTERS:
        name = Image.Resampling(spec.resample).name.lower()
        raise UsageError(f"--gpu-decode resizes bilinear or bicubic, and this model's processor {name}: leave it out")
    try:
        import torchvision.io  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # a build for another PyTorch raises any of these
        raise CapcliError(
            f"--gpu-decode needs torchvision ({error}): pip install 'capcli[gpu-decode]', or leave it out"
        ) from error


def nvjpeg(device: torch.device) -> Decoder:
    """torchvision's decoder on a CUDA device: RuntimeError for all files where one cannot be decoded."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(files: Sequence[Tensor]) -> Sequence[Tensor]:
        images: Sequence[Tensor] = decode_jpeg(list(files), mode=ImageReadMode.RGB, device=device)
        return images

    return decode


class GpuJpegDecoder:
    """Files of plain JPEGs to pixels uint8 [height, width, 3], as `pixels.load` makes them.

    But for rounding, and for what a decoder puts between the colours of pixels that share one.
    """

    def __init__(self, spec: PixelSpec, decode: Decoder, stream: torch.cuda.Stream | None = None) -> None:
        self.spec, self._decode, self._stream = spec, decode, stream

    @classmethod
    def on(cls, device: torch.device, spec: PixelSpec) -> GpuJpegDecoder:
        """By nvJPEG on a CUDA device, on a stream beside that of the decode loop's steps."""
        return cls(spec, nvjpeg(device), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    def __call__(self, files: Sequence[Bytes]) -> list[Bytes | None]:
        """The pixels of each; None for what the GPU does not decode, and where it gives one colour."""
        try:
            made = self.together(files)
        except Exception:  # one is damaged, it is not said which; or there is no memory for so many
            if len(files) == 1:
                return [None]
            half = len(files) // 2
            return [*self(files[:half]), *self(files[half:])]
        # decoders in hardware have been seen to leave an image out and report no error
        return [None if each.min() == each.max() else each for each in made]

    def together(self, files: Sequence[Bytes]) -> list[Bytes]:
        """All of them at once; raises what the decoder raises."""
        with torch.cuda.stream(self._stream):
            images = self._decode([torch.from_numpy(file) for file in files])
            return [resized(image, self.spec).cpu().numpy() for image in images]


def resized(image: Tensor, spec: PixelSpec) -> Tensor:
    """uint8 [3, h, w], of any size, resized and cropped as the processor does -> uint8 [height, width, 3].

    In two passes, each rounded to bytes, in Pillow's order; of its pixels few differ, by 1, hardly any by 2.
    """
    height, width = image.shape[1:]
    size = spec.resized(height, width)
    first = (size[0], width) if pixels.columns_first((width, height), size[::-1]) else (height, size[1])
    for whole in (first, size):
        if whole != tuple(image.shape[1:]):
            # contiguous, so that sums are made in the same order whatever the decoder's layout
            wide = F.interpolate(image[None].float().contiguous(), whole, mode=FILTERS[spec.resample], antialias=True)
            image = wide[0].round_().clamp_(0, 255).to(torch.uint8)
    crop = spec.crop or size
    (top, rows, above), (left, columns, before) = (pixels.window(*each) for each in zip(size, crop, strict=True))
    part = image[:, top : top + rows, left : left + columns].permute(1, 2, 0)
    if (rows, columns) == crop:
        return part.contiguous()
    made = part.new_zeros(*crop, 3)
    made[above : above + rows, before : before + columns] = part
    return made


def rates(jpegs: GpuJpegDecoder) -> tuple[float, float]:
    """Images per second by `jpegs`, and by one decoder process, of a JPEG that is drawn here.

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
        jpegs.together(files)  # libraries set themselves up
        began = time.perf_counter()
        jpegs.together(files)
    except Exception as error:
        raise CapcliError(f"--gpu-decode: torchvision decodes no JPEG on this GPU ({error}); leave it out") from error
    between = time.perf_counter()
    for _ in range(TRIED // 8):
        pixels.load(file, jpegs.spec, max_pixels=MAX_PIXELS)
    return TRIED / (between - began), TRIED // 8 / (time.perf_counter() - between)


class GpuLoading:
    """Arrivals of which a GPU decodes the plain JPEGs, in the entries' order, each as soon as those before it are there.

    Decoder processes read all files: `keep` leaves them the JPEGs for `jpegs`. What those do not decode goes to processes
    again, which `whole` decodes in. `start(entries, decode)` starts them.
    """

    def __init__(
        self, entries: Iterable[Entry], jpegs: GpuJpegDecoder, keep: Decode, whole: Decode, start: Start
    ) -> None:
        self._jpegs = jpegs
        self._entries: deque[Entry] = deque()  # of those under way
        self._loading = start(self._noted(entries), keep)
        self._ready: Queue[Loaded | Failure | BaseException | None] = Queue(2 * MOST)
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._refused = Refused(partial(start, decode=whole), self._closed)
        self._thread = threading.Thread(target=self._work, name="capcli-gpu-decode", daemon=True)
        self.done = False
        self._thread.start()

    def take(self, timeout: float | None = None) -> Loaded | Failure | None:
        """The next; None: nothing within `timeout` seconds (None: as long as it takes), or all is `done`."""
        if self.done:
            return None
        try:
            came = self._ready.get(timeout != 0, timeout)
        except Empty:
            return None
        if came is None or isinstance(came, BaseException):
            self.done = True
            if came is not None:
                raise came
            return None
        return came

    def close(self) -> None:
        """Ends the processes, and the thread once the GPU has decoded what it holds."""
        self._closed.set()
        self._loading.close()
        # An impatient Ctrl-C must not end the interpreter under a thread that computes: it would abort.
        with Interrupts(quiet=True, grace=math.inf):
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _noted(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            self._entries.append(entry)
            yield entry

    def _work(self) -> None:
        try:
            while self._error is None and not (self._closed.is_set() or self._loading.done):
                for each in self._decoded(self._gathered()):
                    self._put(each)
        except BaseException as error:  # it belongs to the thread that takes
            self._error = error
        finally:
            self._refused.close()
        self._put(self._error)

    def _gathered(self) -> list[tuple[Entry, Loaded | Failure]]:
        """What has come, so much as is decoded at a time at most; where nothing has, after HEED seconds what comes first."""
        gathered: list[tuple[Entry, Loaded | Failure]] = []
        size = 0
        while len(gathered) < MOST and size < MOST_BYTES:
            try:
                came = self._loading.take(0 if gathered else POLL_SECONDS)
            except Exception as error:  # to be told after what came before it
                self._error = error
                break
            if came is None:
                break
            gathered.append((self._entries.popleft(), came))
            size += came.pixels.nbytes if isinstance(came, Loaded) else 0
        return gathered

    def _decoded(self, gathered: Sequence[tuple[Entry, Loaded | Failure]]) -> Iterator[Loaded | Failure]:
        files = [came.pixels for _, came in gathered if is_file(came)]
        made = iter(self._jpegs(files) if files else ())
        done: list[Loaded | Failure | None] = []
        for _, came in gathered:
            image = next(made) if is_file(came) else None
            done.append(came if not is_file(came) else None if image is None else replace(came, pixels=image))
        again = self._refused.load([entry for (entry, _), each in zip(gathered, done, strict=True) if each is None])
        for each in done:
            result = next(again, None) if each is None else each
            if result is not None:  # it is, where this was closed
                yield result

    def _put(self, what: Loaded | Failure | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(what, timeout=POLL_SECONDS)
                return
            except Full:
                continue


class Refused:
    """Loads once more, whole and in processes of their own, what a GPU did not decode; they start when the first is to be."""

    def __init__(self, start: Callable[[Iterable[Entry]], Loading], closed: threading.Event) -> None:
        self._start, self._closed = start, closed
        self._queue: SimpleQueue[Entry | None] = SimpleQueue()
        self._loading: Loading | None = None

    def load(self, entries: Sequence[Entry]) -> Iterator[Loaded | Failure]:
        """One for each, in their order; fewer once `closed` is set."""
        if entries and self._loading is None:
            self._loading = self._start(iter(self._queue.get, None))
        for entry in entries:
            self._queue.put(entry)
        for _ in entries:
            came = None
            while came is None and self._loading and not self._closed.is_set():
                came = self._loading.take(POLL_SECONDS)
            if came is not None:
                yield came

    def close(self) -> None:
        self._queue.put(None)
        if self._loading is not None:
            self._loading.close()


def is_file(came: Loaded | Failure) -> TypeGuard[Loaded]:
    """Whether it came as the bytes of its file."""
    return isinstance(came, Loaded) and came.pixels.ndim == 1
