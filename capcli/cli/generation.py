"""Options that say how captions are searched for: shared by the commands that make captions and those that make captioners."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from capcli.cli.sections import SectionedOption
from capcli.options import GenerationOptions

option = partial(click.option, cls=SectionedOption, section="Generation", show_envvar=False)
EARLY = {"true": True, "false": False, "never": "never"}

OPTIONS = (
    option("--num-beams", metavar="N", type=click.IntRange(min=1), help="Beams of beam search; 1 is greedy."),
    option("--max-new-tokens", metavar="N", type=click.IntRange(min=1), help="Longest caption, in tokens."),
    option("--min-new-tokens", metavar="N", type=click.IntRange(min=0), help="Shortest caption, in tokens."),
    option("--length-penalty", metavar="X", type=float, help="With beams: above 0 favours longer captions."),
    option(
        "--early-stopping",
        type=click.Choice(list(EARLY)),
        help="With beams: end when there are captions enough, when better ones are unlikely, or impossible.",
    ),
    option("--no-repeat-ngram-size", metavar="N", type=click.IntRange(min=0), help="Say no N-gram twice; 0 is off."),
    option(
        "--repetition-penalty",
        metavar="X",
        type=click.FloatRange(min=0, min_open=True),
        help="Above 1 makes words said before less likely.",
    ),
    option("--do-sample/--no-do-sample", default=None, help="Draw words at random instead of taking the likeliest."),
    option(
        "--temperature",
        metavar="X",
        type=click.FloatRange(min=0, min_open=True),
        help="With sampling: above 1 is bolder.",
    ),
    option(
        "--top-k", metavar="N", type=click.IntRange(min=0), help="With sampling: only the N likeliest words; 0 is off."
    ),
    option(
        "--top-p",
        metavar="X",
        type=click.FloatRange(min=0, max=1, min_open=True),
        help="With sampling: only the likeliest words that make up this share.",
    ),
    option(
        "--num-return-sequences",
        metavar="N",
        type=click.IntRange(min=1),
        help="Captions per image: the best beams, or samples.",
    ),
)


def generation_options(command: Any) -> Any:
    """Adds OPTIONS to a command, in their order."""
    for each in reversed(OPTIONS):
        command = each(command)
    return command


def taken_generation(given: dict[str, Any]) -> GenerationOptions:
    """The search settings among a command's parameters. Raises UsageError for what cannot be."""
    values = {name: given[name] for name in GenerationOptions.__dataclass_fields__ if name in given}
    return GenerationOptions(**values | {"early_stopping": EARLY.get(given["early_stopping"])})
