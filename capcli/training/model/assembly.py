"""An encoder, a decoder and a tokenizer -> an untrained captioner; or a trained one, to go on from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from capcli.errors import CapcliError, UsageError
from capcli.models.checkpoint import generation_of, load_weights, modules, pixel_size
from capcli.models.encoders import image_size_of
from capcli.models.hub import find_model
from capcli.models.model_files import PROCESSOR
from capcli.options import GenerationOptions, ModelOptions
from capcli.options.train import DEFAULT_LENGTH, NEW
from capcli.pixels import PixelSpec
from capcli.training.model.embeddings import is_foreign
from capcli.training.model.generation_config import set_generation
from capcli.training.model.joining import Parts, joining_of
from capcli.training.model.pretrained import POOLER, Config, config_of, find_part
from capcli.training.model.tokenizers import (
    SpecialTokens,
    has_tokenizer,
    load_tokenizer,
    new_tokenizer,
    read_tokenizer,
    special_tokens,
)


@dataclass(frozen=True, slots=True)
class AssembledCaptioner:
    """A captioner before training, in float32 on the CPU and in eval mode.

    `processor` is the preprocessor_config.json to write beside it and `spec` the same as it is carried out. `new` names what
    has random weights: "encoder", "decoder" or, in a decoder with weights, "embeddings" (with the output layer) and
    "cross-attention"; also "question-encoder", or "question-embeddings" of one with weights. `max_length` is how many
    tokens of a caption are learned from: as asked, or as many as the decoder holds, at most DEFAULT_LENGTH. `notes` are
    lines to say at the start.
    """

    model: PreTrainedModel
    tokenizer: Any
    processor: dict[str, Any]
    specials: SpecialTokens
    spec: PixelSpec
    new: frozenset[str]
    max_length: int
    notes: tuple[str, ...]

    @property
    def new_cross_attention(self) -> bool:
        return bool(self.new & {"decoder", "cross-attention"})


def assemble(
    options: ModelOptions,
    captions: Callable[[], Iterable[str]],
    generation: GenerationOptions,
    seed: int,
    *,
    quiet: bool = False,
) -> AssembledCaptioner:
    """The captioner that the options describe; `captions` gives those that a new tokenizer is trained on.

    The same options, captions and seed give the same weights. Raises UsageError for what cannot be right, CapcliError for
    files that cannot be had, are of no supported kind, or do not fit each other.
    """
    if options.model is not None:
        return _go_on(options.model, options, generation, quiet)
    encoder = find_part("encoder", _given(options.encoder), quiet=quiet)
    decoder = find_part("decoder", _given(options.decoder), quiet=quiet)
    way = joining_of(options, encoder, decoder)
    processor, notes = _processor(encoder)
    spec = _pixels(encoder.title, processor, config_of(encoder), any_size=way.any_size(encoder))
    max_length = _length(decoder.title, way.room(decoder, options), options.max_length)
    own = None if options.tokenizer == NEW else _own_tokenizer(decoder)
    tokenizer = _tokenizer(options, decoder, own, captions, quiet)
    if options.tokenizer == NEW and len(tokenizer) < options.vocab_size:
        asked_for = f"{options.vocab_size:,} of --vocab-size"
        notes.append(f"the new tokenizer has {len(tokenizer):,} tokens, not the {asked_for}: the captions give no more")
    specials = special_tokens(tokenizer, config_of(decoder))
    if tokenizer.pad_token_id is None:  # as GPT-2's: the folder says the same in all its files
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(specials.pad)
    foreign = options.tokenizer == NEW or is_foreign(tokenizer, own, config_of(decoder).vocab_size)
    asked = options.question_encoder
    reader = None if asked is None else find_part("question-encoder", asked, quiet=quiet)
    estranged = reader is not None and _reads_others(reader, tokenizer, decoder, foreign=foreign)
    if options.extra_tokens:
        tokenizer.add_tokens([f"<loc_{number}>" for number in range(options.extra_tokens)])
    joined = way.join(Parts(encoder, decoder, reader, tokenizer, specials, options, seed, foreign, estranged))
    model, specials, new = joined.model, joined.specials, dict(joined.new)
    leave_idle(model)
    if encoder.files is None:
        new["encoder"] = "the encoder has new random weights"
    notes += [part.strange for part in (encoder, decoder, reader) if part is not None and part.strange]
    notes += [line for line in new.values() if line]
    notes += set_generation(model, specials, generation, max_length)
    return AssembledCaptioner(model, tokenizer, processor, specials, spec, frozenset(new), max_length, tuple(notes))


def _go_on(name: str, options: ModelOptions, generation: GenerationOptions, quiet: bool) -> AssembledCaptioner:
    files = find_model(name, quiet=quiet)
    spec = PixelSpec.from_config(files.processor)
    tokenizer: Any = read_tokenizer(files)
    model = load_weights(files, "float32", torch.device("cpu"))
    encode, step = modules(model, spec)
    _refuse_unequal(name, encode.size, spec, any_size=encode.any_size)
    max_length = _length(name, step.positions, options.max_length)
    leave_idle(model)
    specials = _specials_in_force(generation_of(files, model), tokenizer, model.config)
    notes = set_generation(model, specials, generation, None)
    return AssembledCaptioner(
        model, tokenizer, dict(files.processor), specials, spec, frozenset(), max_length, tuple(notes)
    )


def _specials_in_force(generation: dict[str, Any], tokenizer: Any, config: Any) -> SpecialTokens:
    """Those that a trained captioner was made with, whatever its tokenizer calls them."""
    end: Any = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    end = end[0] if isinstance(end, list) and end else end
    start = next(
        (i for i in (generation.get("decoder_start_token_id"), generation.get("bos_token_id")) if i is not None), None
    )
    if end is None or start is None:
        return special_tokens(tokenizer, config.get_text_config(decoder=True))
    pad = generation.get("pad_token_id")
    return SpecialTokens(start, end, end if pad is None else pad, generation.get("forced_bos_token_id"))


def _given(part: Any) -> Any:
    if part is None:  # which ModelOptions refuses
        raise UsageError("give --encoder and --decoder, or --model")
    return part


def _processor(encoder: Config) -> tuple[dict[str, Any], list[str]]:
    """The encoder's own image processor, else ViT's at its size, and a line when weights came without one."""
    if encoder.files is not None and encoder.files.processor:
        return dict(encoder.files.processor), []
    size = image_size_of(config_of(encoder))
    height, width = (size, size) if isinstance(size, int) else size
    made = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    if encoder.files is None:
        return made, []
    line = (
        f"{encoder.title} has no {PROCESSOR}: images are resized to {width}x{height}, with mean 0.5 and deviation 0.5"
    )
    return made, [line]


def _pixels(title: str, processor: dict[str, Any], encoder: Any, *, any_size: bool) -> PixelSpec:
    """Raises CapcliError unless the processor makes the size that the encoder takes, of every image."""
    spec = PixelSpec.from_config(processor)
    _refuse_unequal(title, image_size_of(encoder), spec, any_size=any_size)
    return spec


def _refuse_unequal(title: str, size: int | Sequence[int], spec: PixelSpec, *, any_size: bool) -> None:
    pixel_size(title, size, spec, any_size=any_size)
    if spec.height is None:
        raise CapcliError(
            f"The image processor of {title} leaves images of different sizes, which cannot be trained on together: "
            f"give its {PROCESSOR} a size with height and width, or do_center_crop"
        )


def _length(title: str, holds: int, max_length: int | None) -> int:
    if max_length is None:
        return min(DEFAULT_LENGTH, holds)
    if max_length > holds:
        raise UsageError(f"--max-length is {max_length}, but {title} holds {holds} tokens: give {holds} or less")
    return max_length


def _own_tokenizer(decoder: Config) -> Any:
    if decoder.folder is None or not has_tokenizer(os.listdir(decoder.folder)):
        return None
    return read_tokenizer(decoder.tokenizer_files)


def _reads_others(reader: Config, tokenizer: Any, decoder: Config, *, foreign: bool) -> bool:
    """Whether a question encoder's embeddings mean other tokens. Raises UsageError where the decoder's mean the tokenizer's."""
    if reader.files is None:
        return False
    others = is_foreign(tokenizer, _own_tokenizer(reader), config_of(reader).vocab_size)
    if others and not foreign:
        raise UsageError(
            f"--question-encoder {reader.title} has another vocabulary than {decoder.title}: give one that shares it, or "
            f"--tokenizer {NEW}, with which both get new embeddings"
        )
    return others


def _tokenizer(
    options: ModelOptions, decoder: Config, own: Any, captions: Callable[[], Iterable[str]], quiet: bool
) -> Any:
    if options.tokenizer == NEW:
        return new_tokenizer(captions(), options.vocab_size)
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer, quiet=quiet)
    if own is None:
        raise UsageError(f"{decoder.title} has no tokenizer: give --tokenizer, a name, a folder, or {NEW}")
    return own


def leave_idle(model: Any) -> None:
    """Leaves out of training what has no share in captions, and lets into it what transformers would keep out.

    The encoder's pooler gets no gradient, and stays in the files, where transformers expects it. BERT's embedding of padding
    would get none either, and in many a vocabulary that is the start or the end token as well.
    """
    model.eval()  # as loaded ones are
    for name, weight in model.named_parameters():
        if f".{POOLER}" in name:
            weight.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
