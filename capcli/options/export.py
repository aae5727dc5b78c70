"""Options of `capcli export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from capcli.errors import UsageError
from capcli.options.caption import DEFAULT_MODEL, check_device
from capcli.options.limits import PositiveInt, check_limits


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Build an engine of `kind` from `model`.

    `out` None is `<engines>/<name of the model>`. `profile` is fused (ONNX opset 24) or portable (opset 18). `quantize`
    int8 rounds the weights of matrix products to 8 bits. `num_beams`, `max_new_tokens` and `batch_sizes` fix the shapes
    of TensorRT plans, which also have room for a short prompt (None: the model's own settings); ONNX graphs take any
    shape. `verify_with` is a folder of images for the parity check (None: generated images). `force` keeps an engine that
    fails its parity check.
    """

    kind: Literal["onnx", "tensorrt"]
    model: str = DEFAULT_MODEL
    revision: str | None = None
    out: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    profile: Literal["fused", "portable"] = "fused"
    quantize: Literal["int8"] | None = None
    num_beams: PositiveInt | None = None
    max_new_tokens: PositiveInt | None = None
    batch_sizes: tuple[int, ...] = (1, 8, 64, 256)
    verify_with: str | None = None
    device: str = "auto"
    threads: PositiveInt | None = None
    overwrite: bool = False
    force: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_limits(self)
        check_device(self.device)
        if self.quantize and self.dtype != "float32":
            raise UsageError(f"--quantize {self.quantize} starts from float32 weights: leave --dtype {self.dtype} out")
        if self.quantize and self.kind == "tensorrt":
            raise UsageError("--quantize int8 is for ONNX Runtime on CPUs: give --onnx")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UsageError(f"--batch-sizes is {','.join(map(str, self.batch_sizes))}; each must be at least 1")
