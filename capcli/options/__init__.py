"""The options of the commands: frozen dataclasses that validate their fields. Without torch and NumPy."""

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
from capcli.options.data import DataOptions, TaskOptions, table_of, task_of
from capcli.options.evaluate import EvaluateOptions
from capcli.options.export import ExportOptions
from capcli.options.prepare import DownloadOptions, ImageFormat, PrepareOptions
from capcli.options.train import ModelOptions, TrainOptions

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
