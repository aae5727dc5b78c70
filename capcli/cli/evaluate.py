"""`capcli evaluate`: parses the command line into EvaluateOptions and scores the captions."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from capcli.cli.click_options import SectionedCommand, debug_option, option
from capcli.options import EvaluateOptions

references = partial(option, EvaluateOptions, section="References")
scoring = partial(option, EvaluateOptions, section="Scoring")
output = partial(option, EvaluateOptions, section="Output")


@click.command(cls=SectionedCommand, short_help="Score captions against references: BLEU, METEOR, ROUGE-L, CIDEr.")
@click.argument("captions", nargs=-1, required=True, type=click.Path(allow_dash=True))
@references(
    "--references",
    metavar="PATH",
    type=click.Path(),
    multiple=True,
    required=True,
    help="Reference captions, in any format that --data of capcli prepare and capcli train takes. Repeatable.",
)
@references(
    "--image-column",
    metavar="NAME",
    help="Column or key of the image name, in the references and in CAPTIONS. [default: the usual names]",
)
@references(
    "--caption-column",
    metavar="NAME",
    help="Column or key of the caption, in the references and in CAPTIONS. [default: the usual names]",
)
@references("--split", help="Use the references of this split only.")
@scoring(
    "--tokenize",
    type=click.Choice(["auto", "ptb", "characters"]),
    default="auto",
    show_default=True,
    help="Compare words (ptb), or characters for scripts without spaces. auto: by the script of the references.",
)
@scoring("--without-java", help="Omit METEOR, which needs Java, and tokenize in Python.")
@scoring("--bootstrap", help="Add 95 % confidence intervals from a bootstrap over images.")
@scoring("--resamples", help="Number of bootstrap resamples.")
@scoring("--seed", help="Seed of the bootstrap.")
@output("--per-image", metavar="FILE", type=click.Path(), help="Write the scores of each image to a CSV file.")
@output("--json", help="Print JSON instead of a table.")
@debug_option
def evaluate(**given: Any) -> int:
    """Score CAPTIONS, written by capcli caption or in COCO's results format, against reference captions.

    \b
      capcli evaluate captions.jsonl --references captions.txt
      capcli evaluate before.jsonl after.jsonl --references annotations.json --bootstrap --json
      capcli evaluate greedy.jsonl beams.jsonl samples.jsonl --references annotations.json

    The metrics are those of pycocoevalcap (pip install 'capcli[metrics]'; METEOR also needs a Java runtime). Several files
    are scored on the images that all of them contain, and compared with the first: a difference is another file minus the
    first. Images are matched by name, then by name without folders, without suffix, and by COCO's image number. Empty
    captions are scored. Captions may be of a part of the images with references.

    \b
    Exit codes:
      0  scored
      1  not scored
      2  wrong usage
    """
    given["tokenize"] = None if given["tokenize"] == "auto" else given["tokenize"]
    options = EvaluateOptions(**given)
    from capcli.metrics.run import run

    return run(options)
