"""Options that say what captioner to train: its parts and how they join, or one to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import click

from capcli.cli.sections import SectionedOption

option = partial(click.option, cls=SectionedOption, section="Model", show_envvar=False)


class Part(click.ParamType[Any]):
    """A name, or in a TOML file a table of config values."""

    name = "ID|FOLDER|CONFIG.json"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str | Mapping):
            self.fail(f"{value!r} is neither a name nor a table of config values", param, ctx)
        return value


OPTIONS = (
    option(
        "--encoder",
        type=Part(),
        help="Vision encoder: ViT, DeiT, BEiT, Swin, SwinV2, or ResNet for a prefix or a T5; a .json config gets new weights. "
        "[default of a prefix: microsoft/resnet-101]",
    ),
    option("--decoder", type=Part(), help="Text decoder: GPT-2, BERT or T5; a .json config gets new weights."),
    option(
        "--join",
        type=click.Choice(["cross", "prefix"]),
        help="cross: the decoder attends to the image; prefix: the image stands before the words of a GPT-2. [default: cross]",
    ),
    option(
        "--image-tokens", metavar="K", type=click.IntRange(min=1), help="Of a prefix: cut the image so. [default: 10]"
    ),
    option(
        "--tag-tokens",
        metavar="N",
        type=click.IntRange(min=0),
        help="Of a prefix: read so many tokens of --tags-column. [default: 16 with tags]",
    ),
    option("--question-encoder", type=Part(), help="With a T5: another T5, whose encoder reads the question first."),
    option("--model", metavar="ID|FOLDER", help="Go on from this captioner instead."),
    option(
        "--tokenizer",
        metavar="new|ID|FOLDER",
        help="new: a byte-level BPE trained on the captions. [default: the decoder's own]",
    ),
    option(
        "--vocab-size",
        metavar="N",
        type=click.IntRange(min=1),
        default=15000,
        show_default=True,
        help="Of a new tokenizer.",
    ),
    option(
        "--max-length",
        metavar="N",
        type=click.IntRange(min=2),
        help="Tokens of a caption to learn, its end included. [default: 50, or what the decoder holds]",
    ),
    option(
        "--extra-tokens",
        metavar="N",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Tokens <loc_0>, <loc_1>, ... to add.",
    ),
)


def parts_options(command: Any) -> Any:
    """Adds OPTIONS to a command, in their order."""
    for each in reversed(OPTIONS):
        command = each(command)
    return command
