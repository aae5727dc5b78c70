"""What `capcli export` was asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from capcli.errors import UsageError
from capcli.options.caption import DEFAULT_MODEL, check_device


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """One `capcli export`.

    `kind` is what is built; `out` None is `<engines>/<the model's name>`. `profile` is fused (opset 24) or portable
    (opset 18). `quantize` int8 rounds the weights of matrix products to 8 bits. `num_beams`, `max_new_tokens` and
    `batch_sizes` fix the shapes of plans (None: the model's own; ONNX takes any), which have room for a short prompt too.
    `verify_with` is a folder of images for
    the proof, None: drawn ones. `force` keeps an engine that failed its proof.
    """

    kind: Literal["onnx", "tensorrt"]
    model: str = DEFAULT_MODEL
    revision: str | None = None
    out: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    profile: Literal["fused", "portable"] = "fused"
    quantize: Literal["int8"] | None = None
    num_beams: int | None = None
    max_new_tokens: int | None = None
    batch_sizes: tuple[int, ...] = (1, 8, 64, 256)
    verify_with: str | None = None
    device: str = "auto"
    threads: int | None = None
    overwrite: bool = False
    force: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.quantize and self.dtype != "float32":
            raise UsageError(f"--quantize {self.quantize} begins from float32: leave out --dtype {self.dtype}")
        if self.quantize and self.kind == "tensorrt":
            raise UsageError("--quantize int8 is for ONNX Runtime on CPUs: give --onnx")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UsageError(f"--batch-sizes {','.join(map(str, self.batch_sizes))}: each is at least 1")
