"""The model card of a trained captioner: README.md with its parts, data, settings, scores and how to use it."""

from __future__ import annotations

import json
import ntpath
import os
import posixpath
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from huggingface_hub import ModelCardData

from capcli.errors import CapcliError
from capcli.storage import atomic
from capcli.text import as_text, counted, printable
from capcli.training.output.folder import CARD, CURVES
from capcli.training.output.markdown import code, fenced, prose, table

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
TAGS = ("image-captioning", "image-to-text")
# A space between two of these characters comes from the tokenizer. `capcli caption` uses the same ranges.
WIDE = r"[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFacts:
    """The size of a part of the data."""

    images: int
    captions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """The contents of a card. Any text may contain paths: the card shows only their last part.

    name: the run's folder; encoder, decoder, tokenizer: one line each, such as "vit, 12 layers, 768 wide".
    special_tokens: token and id by role (start, end, pad).
    splits: by name, "train" and "val". left_out: number of images by reason.
    settings: the options in force by name; a nested mapping becomes `table.name`.
    step, validation_loss, scores: of the weights that were kept; the loss covers all validation images, the scores
        `validation_images` of them, or so many answers if there are several tasks.
    prompts: the prompt of each of several tasks. generation: settings that the scored captions were generated with.
    moved_ends: (step at which the run was resumed, its last step before, its last step after).
    architecture: the model_type. loader: transformers' class for it; None if transformers alone cannot caption with it.
    spaced: the tokenizer puts spaces between characters. tagged: the captioner reads tags with an image.
    base_models: names that may be hub IDs; others are ignored.
    """

    name: str
    encoder: str
    decoder: str
    parameters: int
    image_size: tuple[int, int] | None  # height, width; None: as the processor makes each image
    tokenizer: str
    special_tokens: Mapping[str, tuple[str, int]]
    data_files: Sequence[str]
    splits: Mapping[str, SplitFacts]
    left_out: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    step: int | None = None
    validation_loss: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    validation_images: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    moved_ends: Sequence[tuple[int, int, int]] = ()
    generation: Mapping[str, object] = field(default_factory=dict)
    architecture: str = "vision-encoder-decoder"
    loader: str | None = "VisionEncoderDecoderModel"
    spaced: bool = False
    tagged: bool = False
    base_models: Sequence[str] = ()


def write_card(folder: str | os.PathLike[str], facts: CardFacts) -> None:
    """Writes README.md into the folder of a captioner, with curves.png if it exists. Raises CapcliError."""
    path = os.path.join(folder, CARD)
    card = card_text(facts, curves=os.path.exists(os.path.join(folder, CURVES)))
    try:
        atomic.replace(path, [card.encode()])
    except OSError as error:
        raise CapcliError(f"{printable(path)} cannot be written: {error.strerror or error}") from error


def card_text(facts: CardFacts, *, curves: bool) -> str:
    """The whole card: Markdown after YAML front matter."""
    image = f"\n\n![Loss, CIDEr and learning rate over the steps]({CURVES})" if curves else ""
    parts = [
        f"---\n{front_matter(facts).to_yaml()}\n---",
        f"# {prose(last_part(facts.name))}",
        parts_section(facts),
        "## Data\n\n" + data_section(facts),
        "## Training\n\n" + training_section(facts),
        "## Scores\n\n" + scores_section(facts) + image,
        "## Use\n\n" + use_section(facts),
        "## Limits\n\n" + limits_section(facts),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: CardFacts) -> ModelCardData:
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-to-text",
        tags=[*TAGS, as_text(printable(facts.architecture)), "capcli"],
        base_model=[name for name in dict.fromkeys(facts.base_models) if HUB_ID.fullmatch(name)] or None,
    )


def parts_section(facts: CardFacts) -> str:
    size = "as the image processor makes each image"
    if facts.image_size is not None:
        size = f"{facts.image_size[1]} x {facts.image_size[0]} pixels"
    tokens = ", ".join(f"{prose(role)} {code(token)} ({i})" for role, (token, i) in facts.special_tokens.items())
    rows = [
        ("encoder", prose(short(facts.encoder))),
        ("decoder", prose(short(facts.decoder))),
        ("parameters", f"{facts.parameters:,}"),
        ("image size", size),
        ("tokenizer", prose(short(facts.tokenizer))),
        ("special tokens", tokens),
    ]
    return f"An image captioner, trained with capcli.\n\n{table(('part', 'description'), rows)}"


def data_section(facts: CardFacts) -> str:
    files = ", ".join(dict.fromkeys(code(last_part(name)) for name in facts.data_files))
    rows = [(prose(name), f"{split.images:,}", f"{split.captions:,}") for name, split in facts.splits.items()]
    parts = [f"Read from {files}." if files else "", table(("split", "images", "captions"), rows)]
    if any(facts.left_out.values()):
        parts.append(f"Left out: {', '.join(f'{n:,} {prose(why)}' for why, n in facts.left_out.items() if n)}.")
    return "\n\n".join(part for part in parts if part)


def training_section(facts: CardFacts) -> str:
    moved = [
        f"At step {step:,} the run was resumed, to end at step {after:,} instead of {before:,}."
        for step, before, after in facts.moved_ends
    ]
    rows = [(code(name), code(shown(value))) for name, value in flat(facts.settings) if value is not None]
    return "\n\n".join([table(("setting", "value"), rows), *moved])


def scores_section(facts: CardFacts) -> str:
    rows = [] if facts.validation_loss is None else [("validation loss", f"{facts.validation_loss:.4f}")]
    rows += [(prose(name), f"{value:.4f}") for name, value in facts.scores.items()]
    if not rows:
        return "Not evaluated: there were no validation images."
    weights = "" if facts.step is None else f", with the weights of step {facts.step:,}"
    text = f"On {validation_images(facts)}{weights}."
    if facts.scores and facts.generation:
        settings = ", ".join(code(f"{name}={shown(value)}") for name, value in flat(facts.generation))
        text += f" The {'answers' if facts.prompts else 'captions'} were generated with {settings}."
    return f"{text}\n\n{table(('measure', 'value'), rows)}"


def validation_images(facts: CardFacts) -> str:
    """How many images the loss and, if fewer, the scores are computed on."""
    total = facts.splits["val"].images if "val" in facts.splits else None
    if facts.prompts and total is not None and facts.scores and facts.validation_images is not None:
        return f"{counted(total, 'validation image')}, with {counted(facts.validation_images, 'answer')} (the loss covers all)"
    captioned = facts.validation_images if facts.scores else total
    if total is None or captioned is None or total == captioned:
        count = total if captioned is None else captioned
        return "validation images" if count is None else counted(count, "validation image")
    if facts.validation_loss is None:
        return f"{captioned:,} of {counted(total, 'validation image')}"
    some = f"{captioned:,} {'was' if captioned == 1 else 'were'} captioned"
    return f"{counted(total, 'validation image')}, of which {some} (the loss covers all)"


def use_section(facts: CardFacts) -> str:
    folder = as_text(last_part(facts.name))
    shell = [f"capcli caption photos --model {shell_word(folder)} --out captions.jsonl"]
    if facts.tagged:
        shell.append("# with the tags of each photo in the field `tags` of photos/metadata.jsonl: --tags-field tags")
    program = "capcli" if facts.loader is None else "transformers alone"
    lines = capcli_code(folder, tagged=facts.tagged) if facts.loader is None else transformers_code(facts, facts.loader)
    parts = ["Caption a folder of photos:", fenced("sh", shell)]
    parts += [f"Caption one photo with {program}:", fenced("python", lines)]
    if facts.prompts:
        rows = [(prose(name), code(prompt)) for name, prompt in facts.prompts.items()]
        parts += ["It was trained on several tasks; `--prompt` selects one:", table(("task", "--prompt"), rows)]
    return "\n\n".join(parts)


def capcli_code(folder: str, *, tagged: bool) -> list[str]:
    tags = ', tags=["[dog] [beach]"])  # tags of each photo; None if it has none' if tagged else ")"
    return [
        "from capcli import Captioner",
        "",
        f"captioner = Captioner.load({python_string(folder)})  # this folder, or its name on the hub",
        f'[caption] = captioner.caption(["photo.jpg"]{tags}',
        "print(caption.text)",
    ]


def transformers_code(facts: CardFacts, loader: str) -> list[str]:
    names = sorted(("AutoImageProcessor", "AutoTokenizer", loader))
    lines = [
        *(["import re", ""] if facts.spaced else []),
        "from PIL import Image, ImageOps",
        f"from transformers import {', '.join(names)}",
        "",
        f"folder = {python_string(as_text(last_part(facts.name)))}  # this folder, or its name on the hub",
        "processor = AutoImageProcessor.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {loader}.from_pretrained(folder).eval()",
        "",
        'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")',
        'pixels = processor(image, return_tensors="pt").pixel_values',
        "tokens = model.generate(pixel_values=pixels)[0]",
        "caption = tokenizer.decode(tokens, skip_special_tokens=True).strip()",
    ]
    if facts.spaced:
        lines += [f'wide = "{WIDE}"', 'caption = re.sub(f"(?<={wide}) (?={wide})", "", caption)']
    return [*lines, "print(caption)"]


def python_string(text: str) -> str:
    """The text as a Python literal in double quotes where it is printable."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)


def limits_section(facts: CardFacts) -> str:
    first = next(iter(facts.splits.values()), SplitFacts(images=0, captions=0))
    train = facts.splits.get("train", first)
    captions, images = counted(train.captions, "caption"), counted(train.images, "image")
    return (
        f"Trained on {captions} of {images}, it describes other subjects poorly, names objects that are not in the "
        "image, and repeats the style and the biases of its training captions. Have a person review the captions "
        "wherever a wrong one could do harm."
    )


def flat(settings: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    """Settings with those of nested mappings under dotted names; mappings in a list are numbered from 1."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value, 1):
                yield from flat(item, f"{prefix}{name}.{number}.")
        else:
            yield f"{prefix}{name}", value


def shown(value: object) -> str:
    """A setting's value roughly as in TOML; of a path only the last part."""
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    if isinstance(value, str):
        return short(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Iterable):
        return ", ".join(shown(item) for item in value)
    return str(value)


def short(text: str) -> str:
    """The text with each absolute path in it cut to its last part: a card must not describe the machine."""
    if text.startswith(("/", "~/", "file://", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", text):
        return last_part(text)
    # A path inside text starts after a space, quote, comma or "=". A slash inside a word belongs to a hub ID.
    return re.sub(
        r"(?<![^\s=,:;'\"(\[])(?!//)(?:file://|~)?(?:/|[A-Za-z]:[\\/]|\\\\)[^\s,;'\")\]]+",
        lambda match: last_part(match[0]),
        text,
    )


def last_part(path: str) -> str:
    windows = re.match(r"[A-Za-z]:|\\\\", path) is not None
    split = ntpath.basename if windows else posixpath.basename
    return split(path.rstrip("/\\" if windows else "/"))


def shell_word(text: str) -> str:
    """The text quoted for a POSIX shell; `./` before a leading dash, so that it is not an option."""
    if not text.isprintable():
        return "DIR"
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
