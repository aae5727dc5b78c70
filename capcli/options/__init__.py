"""What a command was asked to do: one frozen, validated dataclass per concern. No torch, no NumPy."""

from capcli.options.bench import BenchOptions
from capcli.options.caption import (
    DECODE_TIMEOUT,
    DEFAULT_MODEL,
    MAX_PIXELS,
    CaptionOptions,
    Existing,
    Format,
    GenerationOptions,
    SinkOptions,
    SourceOptions,
    Suffix,
    check_device,
)
from capcli.options.data import DataOptions
from capcli.options.evaluate import EvaluateOptions
from capcli.options.export import ExportOptions
from capcli.options.prepare import DownloadOptions, ImageFormat, PrepareOptions
from capcli.options.task import TaskOptions, table_of, task_of
from capcli.options.train import TrainOptions
from capcli.options.training_model import ModelOptions

__all__ = [
    "DECODE_TIMEOUT",
    "DEFAULT_MODEL",
    "MAX_PIXELS",
    "BenchOptions",
    "CaptionOptions",
    "DataOptions",
    "DownloadOptions",
    "EvaluateOptions",
    "Existing",
    "ExportOptions",
    "Format",
    "GenerationOptions",
    "ImageFormat",
    "ModelOptions",
    "PrepareOptions",
    "SinkOptions",
    "SourceOptions",
    "Suffix",
    "TaskOptions",
    "TrainOptions",
    "check_device",
    "table_of",
    "task_of",
]
