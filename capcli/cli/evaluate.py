"""`capcli evaluate`: parse, build EvaluateOptions, measure the captions, exit with its code."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from capcli.cli.sections import SectionedCommand, SectionedOption, set_note
from capcli.options import EvaluateOptions

references, measuring, output, running = (
    partial(click.option, cls=SectionedOption, section=section, show_envvar=False)
    for section in ("References", "Measuring", "Output", "Running")
)


@click.command(cls=SectionedCommand, short_help="Measure captions against references: BLEU, METEOR, ROUGE-L, CIDEr.")
@click.argument("captions", nargs=-1, required=True, type=click.Path(allow_dash=True))
@references(
    "--references",
    metavar="PATH",
    type=click.Path(),
    multiple=True,
    required=True,
    help="What people wrote of the images, in any format that --data of prepare and train takes; repeatable.",
)
@references(
    "--image-column",
    metavar="NAME",
    help="Column or key of the image's name, in these and in CAPTIONS, where they have it. [default: the usual ones]",
)
@references("--caption-column", metavar="NAME", help="The same, of the caption.")
@references("--split", type=click.Choice(["train", "val", "test"]), help="Take the references of this split only.")
@measuring(
    "--tokenize",
    type=click.Choice(["auto", "ptb", "characters"]),
    default="auto",
    show_default=True,
    help="Compare words, or characters where a script has no spaces; auto goes by the references.",
)
@measuring("--without-java", is_flag=True, help="Leave METEOR out, which needs Java, and tokenize in Python.")
@measuring("--bootstrap", is_flag=True, help="Add 95 % intervals: images are drawn again and again.")
@measuring(
    "--resamples",
    metavar="N",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="With --bootstrap: how often.",
)
@measuring("--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@output("--per-image", metavar="FILE", type=click.Path(), help="Write the scores of each image to a CSV file.")
@output("--json", is_flag=True, help="JSON on standard output in place of the table.")
@running("--debug", is_flag=True, expose_value=False, callback=set_note, help="Show where an error came from.")
def evaluate(**given: Any) -> int:
    """Measure CAPTIONS, as capcli caption writes them or COCO's results, against what people wrote of the same images.

    \b
      capcli evaluate captions.jsonl --references captions.txt
      capcli evaluate before.jsonl after.jsonl --references annotations.json --bootstrap --json

    The measures are pycocoevalcap's (pip install 'capcli[metrics]'; METEOR needs a Java runtime besides). With two files
    the same images of both are measured; the difference is the second less the first. Images are matched by name, then
    by name without folders, without suffix, and by COCO's number. An empty caption counts.
    """
    given["tokenize"] = None if given["tokenize"] == "auto" else given["tokenize"]
    options = EvaluateOptions(**given)
    from capcli.metrics.run import run

    return run(options)
