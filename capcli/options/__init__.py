"""The options of the commands: frozen dataclasses that validate their fields. Without torch and NumPy."""

from capcli.options.bench import BenchOptions
from capcli.options.caption import (
    DECODE_TIMEOUT,
    DEFAULT_MODEL,
    MAX_IMAGE_EDGE,
    MAX_PIXELS,
    BackendName,
    CaptionOptions,
    Existing,
    Format,
    GenerationOptions,
    OnBad,
    SinkOptions,
    SourceOptions,
    Suffix,
    check_device,
)
from capcli.options.data import DataOptions, TaskOptions, table_of, task_of
from capcli.options.evaluate import EvaluateOptions
from capcli.options.export import ExportOptions
from capcli.options.prepare import DownloadOptions, ImageFormat, PrepareOptions
from capcli.options.server import EndpointOptions
from capcli.options.train import ModelOptions, TrainOptions

__all__ = [
    "DECODE_TIMEOUT",
    "DEFAULT_MODEL",
    "MAX_IMAGE_EDGE",
    "MAX_PIXELS",
    "BackendName",
    "BenchOptions",
    "CaptionOptions",
    "DataOptions",
    "DownloadOptions",
    "EndpointOptions",
    "EvaluateOptions",
    "Existing",
    "ExportOptions",
    "Format",
    "GenerationOptions",
    "ImageFormat",
    "ModelOptions",
    "OnBad",
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
