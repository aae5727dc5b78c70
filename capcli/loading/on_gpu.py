"""JPEGs decoded and resized on a GPU, many at a time, in a thread between loading and the decode loop."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Self, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from capcli import pixels
from capcli.errors import CapcliError, ImageError, UsageError
from capcli.loading import Loading
from capcli.pixels import PixelSpec
from capcli.pixels.processor import BICUBIC, BILINEAR
from capcli.records import Failure, Loaded

MOST, MOST_BYTES = 128, 32 << 20  # files decoded at a time; decoded they are ten times as large, or more
HEED = 0.2  # seconds after which a wait looks whether it should end
FILTERS = {BILINEAR: "bilinear", BICUBIC: "bicubic"}  # Pillow's numbers, PyTorch's names
TRIED, TRIED_SIZE = 64, (640, 480)  # how many JPEGs, of which width and height, GPU and processes are compared by

Bytes = npt.NDArray[np.uint8]
Decode = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # files, uint8 [n] each -> images, uint8 [3, h, w]


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


def nvjpeg(device: torch.device) -> Decode:
    """torchvision's decoder on a CUDA device: RuntimeError for all files where one cannot be decoded."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(files: Sequence[Tensor]) -> Sequence[Tensor]:
        images: Sequence[Tensor] = decode_jpeg(list(files), mode=ImageReadMode.RGB, device=device)
        return images

    return decode


class Jpegs:
    """Files of plain JPEGs to pixels uint8 [height, width, 3], as `pixels.load` makes them but for rounding."""

    def __init__(self, spec: PixelSpec, max_pixels: int, decode: Decode) -> None:
        self._spec, self._max_pixels, self._decode = spec, max_pixels, decode

    def __call__(self, files: Sequence[Bytes]) -> list[Bytes | ImageError]:
        """The pixels of each, or why there are none. Pillow decides where the decoder gives none, or one colour."""
        made = self._together(files)
        return [self._apart(file) if got is None else got for file, got in zip(files, made, strict=True)]

    def _together(self, files: Sequence[Bytes]) -> list[Bytes | None]:
        try:
            images = self._decode([torch.from_numpy(file) for file in files])
            made = [resized(image, self._spec).cpu().numpy() for image in images]
        except RuntimeError:  # one is damaged, it is not said which; or there is no memory for so many
            if len(files) == 1:
                return [None]
            half = len(files) // 2
            return [*self._together(files[:half]), *self._together(files[half:])]
        # decoders in hardware have been seen to leave an image out and report no error
        return [None if each.min() == each.max() else each for each in made]

    def _apart(self, file: Bytes) -> Bytes | ImageError:
        try:
            return pixels.load(file.tobytes(), self._spec, max_pixels=self._max_pixels)[0]
        except ImageError as error:
            return error


def resized(image: Tensor, spec: PixelSpec) -> Tensor:
    """uint8 [3, h, w], of any size, resized and cropped as the processor does -> uint8 [height, width, 3].

    In two passes, each rounded to bytes, as Pillow does; of its pixels few differ, by 1, hardly any by 2.
    """
    height, width = image.shape[1:]
    size = spec.resized(height, width)
    for whole in ((height, size[1]), size):
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


def rates(jpegs: Jpegs, spec: PixelSpec, max_pixels: int) -> tuple[float, float]:
    """Images per second by `jpegs`, and by one decoder process, of a JPEG that is drawn here."""
    draw = np.random.default_rng(0)
    fields = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(TRIED_SIZE)
    noise = draw.integers(-12, 13, (*TRIED_SIZE[::-1], 1))
    stream = io.BytesIO()
    Image.fromarray((np.asarray(fields) + noise).clip(0, 255).astype(np.uint8)).save(stream, "jpeg", quality=90)
    file = stream.getvalue()
    files = [np.frombuffer(file, np.uint8).copy()] * TRIED
    jpegs(files)  # libraries set themselves up
    began = time.perf_counter()
    jpegs(files)
    between = time.perf_counter()
    for _ in range(TRIED // 8):
        pixels.load(file, spec, max_pixels=max_pixels)
    return TRIED / (between - began), TRIED // 8 / (time.perf_counter() - between)


class OnGpu:
    """Arrivals of which the files that `loading` gave are decoded; in their order, each as soon as those before it are."""

    def __init__(self, loading: Loading, jpegs: Callable[[Sequence[Bytes]], list[Bytes | ImageError]]) -> None:
        self._loading, self._jpegs = loading, jpegs
        self._ready: Queue[Loaded | Failure | BaseException | None] = Queue(2 * MOST)
        self._error: BaseException | None = None
        self._closed = threading.Event()
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
        """Ends loading, and the thread once it has decoded what it holds."""
        self._closed.set()
        self._loading.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while self._error is None and not (self._closed.is_set() or self._loading.done):
                for each in self._decoded(self._gathered()):
                    self._put(each)
        except BaseException as error:  # it belongs to the thread that takes
            self._error = error
        self._put(self._error)

    def _gathered(self) -> list[Loaded | Failure]:
        """What has come, so much as is decoded at a time at most; where nothing has, after HEED seconds what comes first."""
        gathered: list[Loaded | Failure] = []
        size = 0
        while len(gathered) < MOST and size < MOST_BYTES:
            try:
                came = self._loading.take(0 if gathered else HEED)
            except Exception as error:  # to be told after what came before it
                self._error = error
                break
            if came is None:
                break
            gathered.append(came)
            size += came.pixels.nbytes if isinstance(came, Loaded) else 0
        return gathered

    def _decoded(self, gathered: Sequence[Loaded | Failure]) -> Sequence[Loaded | Failure]:
        files = [each.pixels for each in gathered if is_file(each)]
        made = iter(self._jpegs(files) if files else ())
        return [settled(each, next(made)) if is_file(each) else each for each in gathered]

    def _put(self, what: Loaded | Failure | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(what, timeout=HEED)
                return
            except Full:
                continue


def is_file(each: Loaded | Failure) -> TypeGuard[Loaded]:
    """Whether it came as the bytes of its file."""
    return isinstance(each, Loaded) and each.pixels.ndim == 1


def settled(kept: Loaded, made: Bytes | ImageError) -> Loaded | Failure:
    """An image that came as its file, with what was made of it."""
    if isinstance(made, ImageError):
        return Failure(kept.name, made.kind, str(made))
    return replace(kept, pixels=made)
