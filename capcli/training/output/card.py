"""The model card of a trained captioner: README.md with what it is, what it learnt from, how good it is, how to use it."""

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

from capcli.errors import CapcliError
from capcli.storage import atomic
from capcli.text import as_text, counted, printable
from capcli.training.output.history import PNG
from capcli.training.output.markdown import code, fenced, prose, table, yaml_string

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
TAGS = ("image-captioning", "image-to-text")
# Between two of these a space is the tokenizer's and not the language's, as `capcli caption` has it.
WIDE = r"[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFacts:
    """How much a part of the data holds."""

    images: int
    captions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card says. Anything here may hold paths: the card shows the last part of a name only.

    `encoder`, `decoder` and `tokenizer` are words, such as "ViT, 12 layers, 768 wide, from google/vit-base-patch16-224".
    `special_tokens` are roles (start, end, pad) with the token and its id. `splits` go by name, what was learnt from
    first. `left_out` counts by reason. `settings` are the resolved options by name; a table within becomes `table.name`.
    `validation_images` is how many images `scores` are of, at `step` of the weights that were kept, captioned with
    `generation`; the validation loss is of all there are in `splits`. `prompts` are what each of
    several tasks asks, by its name: then `validation_images` counts answers. `moved_ends` are the steps at which the run was
    gone on with to another end, with the end before and after. `processor` is the image processor's class in transformers, which
    it may also find itself. `architecture` is the model_type, `loader` transformers' class for it, or None where it takes more
    than that to caption a photo: for capcli's own, and where a question is asked. `spaced` says that the tokenizer puts spaces
    between characters, `tagged` that the captioner reads tags beside an image. `base_models` are hub IDs; what cannot be one
    is not named.
    """

    name: str
    encoder: str
    decoder: str
    parameters: int
    image_size: tuple[int, int]  # height and width
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
    processor: str = "AutoImageProcessor"
    architecture: str = "vision-encoder-decoder"
    loader: str | None = "VisionEncoderDecoderModel"
    spaced: bool = False
    tagged: bool = False
    base_models: Sequence[str] = ()
    languages: Sequence[str] = ()  # codes: en, zh, ...


def write_card(folder: str | os.PathLike[str], facts: CardFacts) -> None:
    """Write README.md into the folder of a captioner; curves.png is shown if it is there. Raises CapcliError."""
    folder = os.fspath(folder)
    path = os.path.join(folder, CARD)
    card = write_text(facts, curves=os.path.exists(os.path.join(folder, PNG)))
    try:
        atomic.replace(path, [card.encode()])
    except OSError as error:
        raise CapcliError(f"{printable(path)} cannot be written: {error.strerror or error}") from error


def write_text(facts: CardFacts, *, curves: bool) -> str:
    """The whole card, as Markdown behind YAML."""
    parts = [
        front_matter(facts),
        f"# {prose(last_part(facts.name))}",
        what_it_is(facts),
        "## Data\n\n" + data(facts),
        "## Training\n\n" + training(facts),
        "## Scores\n\n"
        + measured(facts)
        + (f"\n\n![Loss, CIDEr and learning rate over the steps]({PNG})" if curves else ""),
        "## Use\n\n" + use(facts),
        "## Limits\n\n" + limits(facts),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: CardFacts) -> str:
    lists = {
        "language": facts.languages,
        "tags": (*TAGS, facts.architecture, "capcli"),
        "base_model": [name for name in facts.base_models if HUB_ID.fullmatch(name)],
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: image-to-text"]
    for key, items in lists.items():
        if items:
            lines += [f"{key}:", *(f"- {yaml_string(item)}" for item in dict.fromkeys(items))]
    return "\n".join([*lines, "---"])


def what_it_is(facts: CardFacts) -> str:
    height, width = facts.image_size
    rows = [
        ("encoder", prose(short(facts.encoder))),
        ("decoder", prose(short(facts.decoder))),
        ("parameters", f"{facts.parameters:,}"),
        ("image size", f"{width} x {height} pixels"),
        ("tokenizer", prose(short(facts.tokenizer))),
        ("special tokens", ", ".join(f"{prose(r)} {code(t)} ({n})" for r, (t, n) in facts.special_tokens.items())),
    ]
    return f"An image captioner, trained with capcli.\n\n{table(('part', 'what it is'), rows)}"


def data(facts: CardFacts) -> str:
    files = ", ".join(dict.fromkeys(code(last_part(name)) for name in facts.data_files))
    rows = [(prose(name), f"{split.images:,}", f"{split.captions:,}") for name, split in facts.splits.items()]
    parts = [f"Read from {files}." if files else "", table(("split", "images", "captions"), rows)]
    if any(facts.left_out.values()):
        parts.append(f"Left out: {', '.join(f'{n:,} {prose(why)}' for why, n in facts.left_out.items() if n)}.")
    return "\n\n".join(part for part in parts if part)


def training(facts: CardFacts) -> str:
    moved = [
        f"At step {at:,} the run was gone on with, to end at step {after:,} in place of {before:,}."
        for at, before, after in facts.moved_ends
    ]
    return "\n\n".join([table(("setting", "value"), settings_rows(facts.settings)), *moved])


def measured(facts: CardFacts) -> str:
    rows = [] if facts.validation_loss is None else [("validation loss", f"{facts.validation_loss:.4f}")]
    rows += [(prose(name), f"{value:.4f}") for name, value in facts.scores.items()]
    if not rows:
        return "It was not measured: there were no validation images."
    at = "" if facts.step is None else f", with the weights of step {facts.step:,}"
    said = f"On {measured_on(facts)}{at}."
    if facts.scores and facts.generation:
        chosen = ", ".join(code(f"{name}={shown(value)}") for name, value in flat(facts.generation))
        said += f" The {'answers' if facts.prompts else 'captions'} were generated with {chosen}."
    return f"{said}\n\n{table(('measure', 'value'), rows)}"


def measured_on(facts: CardFacts) -> str:
    """The validation images: all of them for the loss, and how many were captioned where these are fewer."""
    every = facts.splits["val"].images if "val" in facts.splits else None
    if facts.prompts and every is not None and facts.scores and facts.validation_images is not None:
        return f"{counted(every, 'validation image')}, with {counted(facts.validation_images, 'answer')} (the loss is of all)"
    captioned = facts.validation_images if facts.scores else every
    if every is None or captioned is None or every == captioned:
        count = every if captioned is None else captioned
        return "validation images" if count is None else counted(count, "validation image")
    if facts.validation_loss is None:
        return f"{captioned:,} of {counted(every, 'validation image')}"
    some = f"{captioned:,} {'was' if captioned == 1 else 'were'} captioned"
    return f"{counted(every, 'validation image')}, of which {some} (the loss is of all)"


def use(facts: CardFacts) -> str:
    folder = as_text(last_part(facts.name))
    shell = [f"capcli caption photos --model {shell_word(folder)} --out captions.jsonl"]
    if facts.tagged:
        shell.append("# with words on each photo in the field `tags` of photos/metadata.jsonl: --tags-field tags")
    photo = f"One photo, with {'capcli' if facts.loader is None else 'transformers alone'}"
    lines = by_capcli(folder, tagged=facts.tagged) if facts.loader is None else by_transformers(facts, facts.loader)
    parts = ["A folder of photos, fast:", fenced("sh", shell), f"{photo}:", fenced("python", lines)]
    if facts.prompts:
        rows = [(prose(name), code(prompt)) for name, prompt in facts.prompts.items()]
        parts += ["It has learnt several tasks; `--prompt` says which:", table(("task", "--prompt"), rows)]
    return "\n\n".join(parts)


def by_capcli(folder: str, *, tagged: bool) -> list[str]:
    asked = ', tags=["[dog] [beach]"])  # words on each photo; None: none' if tagged else ")"
    return [
        "from capcli import Captioner",
        "",
        f"captioner = Captioner.load({literal(folder)})  # this folder, or its name on the hub",
        f'[caption] = captioner.caption(["photo.jpg"]{asked}',
        "print(caption.text)",
    ]


def literal(folder: str) -> str:
    return json.dumps(folder, ensure_ascii=False) if folder.isprintable() else ascii(folder)


def by_transformers(facts: CardFacts, loader: str) -> list[str]:
    folder = as_text(last_part(facts.name))
    processor = (
        facts.processor if facts.processor.isidentifier() and facts.processor.isascii() else "AutoImageProcessor"
    )
    names = sorted((processor, "AutoTokenizer", loader))
    lines = [
        *(["import re", ""] if facts.spaced else []),
        "from PIL import Image, ImageOps",
        f"from transformers import {', '.join(names)}",
        "",
        f"folder = {literal(folder)}  # this folder, or its name on the hub",
        f"processor = {processor}.from_pretrained(folder)",
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


def limits(facts: CardFacts) -> str:
    first = next(iter(facts.splits.values()), SplitFacts(images=0, captions=0))
    train = facts.splits.get("train", first)
    captions, images = counted(train.captions, "caption"), counted(train.images, "image")
    return (
        f"It has learnt to caption from {captions} of {images} and knows little of what those "
        "do not show, so it will name things that are not there, in the tone and with the prejudices of its examples: "
        "have a person look before a wrong caption can do harm."
    )


def settings_rows(settings: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(code(name), code(shown(value))) for name, value in flat(settings) if value is not None]


def flat(settings: Mapping[str, object], above: str = "") -> Iterable[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):  # tables of one name
            for number, item in enumerate(value, 1):
                yield from flat(item, f"{above}{name}.{number}.")
        else:
            yield f"{above}{name}", value


def shown(value: object) -> str:
    """A setting's value as TOML would have it, of paths the last part."""
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
    """The text with the last part of each absolute path in it: a card tells nothing of the machine."""
    if is_absolute(text):
        return last_part(text)
    # A path within words begins behind a space, a quote or what assigns it; a slash inside a word is a hub ID's.
    return re.sub(
        r"(?<![^\s=,:;'\"(\[])(?!//)(?:file://|~)?(?:/|[A-Za-z]:[\\/]|\\\\)[^\s,;'\")\]]+",
        lambda m: last_part(m[0]),
        text,
    )


def is_absolute(text: str) -> bool:
    return text.startswith(("/", "~/", "file://", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", text) is not None


def last_part(path: str) -> str:
    windows = re.match(r"[A-Za-z]:|\\\\", path) is not None
    split = ntpath.basename if windows else posixpath.basename
    return split(path.rstrip("/\\" if windows else "/"))


def shell_word(text: str) -> str:
    """The text as one word for a POSIX shell. A name that begins with a dash is no option behind `./`."""
    if not text.isprintable():
        return "DIR"
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
