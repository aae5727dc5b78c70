"""Assembles the captioner to train: a new one from encoder, decoder and tokenizer, or a trained one to train further."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from capcli.errors import CapcliError, UsageError
from capcli.models.checkpoint import encode_and_step, generation_of, load_weights, pixel_size
from capcli.models.encoders import image_size_of
from capcli.models.families import unused_weights
from capcli.models.hub import find_model
from capcli.models.model_files import PROCESSOR
from capcli.models.modules import Encode, Step
from capcli.options import GenerationOptions, ModelOptions
from capcli.options.train import DEFAULT_LENGTH, NEW
from capcli.pixels import PixelSpec
from capcli.training.model.embeddings import needs_new_embeddings
from capcli.training.model.generation_config import set_generation
from capcli.training.model.joining import JoinInputs, choose_join
from capcli.training.model.pretrained import PartConfig, config_of, find_part
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

    `encode` and `step` are its two modules for captioning; they share the weights of `model`. `processor` is the
    preprocessor_config.json to write beside it and `spec` the same parsed. `new` names the parts with random weights:
    "encoder", "decoder" or, in a decoder with weights, "embeddings" (with the output layer) and "cross-attention"; also
    "question-encoder", or "question-embeddings" of one with weights. `max_length` is how many tokens of a caption are
    trained on. `notes` are lines to show before training.
    """

    model: PreTrainedModel
    encode: Encode
    step: Step
    tokenizer: Any
    processor: dict[str, Any]
    specials: SpecialTokens
    spec: PixelSpec
    new: frozenset[str]
    max_length: int
    notes: tuple[str, ...]


def assemble(
    options: ModelOptions,
    captions: Callable[[], Iterable[str]],
    generation: GenerationOptions,
    seed: int,
    *,
    quiet: bool = False,
) -> AssembledCaptioner:
    """The captioner that the options describe; a new tokenizer is trained on what `captions` returns.

    The same options, captions and seed give the same weights. Raises UsageError for invalid options, CapcliError
    for files that cannot be read, are of no supported kind, or do not fit each other.
    """
    if options.model is not None:
        return _from_captioner(options.model, options, generation, quiet)
    return _from_parts(options, captions, generation, seed, quiet)


def _from_parts(
    options: ModelOptions, captions: Callable[[], Iterable[str]], generation: GenerationOptions, seed: int, quiet: bool
) -> AssembledCaptioner:
    assert options.encoder is not None, "ModelOptions checks this"
    assert options.decoder is not None, "ModelOptions checks this"
    encoder = find_part("encoder", options.encoder, quiet=quiet)
    decoder = find_part("decoder", options.decoder, quiet=quiet)
    join = choose_join(options, encoder, decoder)
    processor, notes = _processor(encoder)
    spec = PixelSpec.from_config(processor)
    _check_pixels(encoder.title, image_size_of(config_of(encoder)), spec, any_size=join.any_size(encoder))
    max_length = _max_length(decoder.title, join.max_tokens(decoder, options), options.max_length)
    tokenizer, new_embeddings = _tokenizer_for(decoder, options, captions, quiet)
    if options.tokenizer == NEW and len(tokenizer) < options.vocab_size:
        notes.append(
            f"the new tokenizer has {len(tokenizer):,} tokens, fewer than --vocab-size {options.vocab_size:,}: the captions "
            "give no more"
        )
    specials = special_tokens(tokenizer, config_of(decoder))
    if tokenizer.pad_token_id is None:  # GPT-2's has none: all files of the folder must name the same one
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(specials.pad)
    question_encoder, new_question_embeddings = None, False
    if options.question_encoder is not None:
        question_encoder = find_part("question-encoder", options.question_encoder, quiet=quiet)
        new_question_embeddings = _question_embeddings(
            question_encoder, tokenizer, decoder, new_embeddings=new_embeddings
        )
    if options.extra_tokens:
        tokenizer.add_tokens([f"<loc_{number}>" for number in range(options.extra_tokens)])
    joined = join.join(
        JoinInputs(
            *(encoder, decoder, question_encoder, tokenizer, specials, options, seed),
            new_embeddings=new_embeddings,
            new_question_embeddings=new_question_embeddings,
        )
    )
    new = dict(joined.new)
    if encoder.files is None:
        new["encoder"] = "the encoder has new random weights"
    notes += [part.unused for part in (encoder, decoder, question_encoder) if part is not None and part.unused]
    notes += [line for line in new.values() if line]
    prepare_for_training(joined.model)
    encode, step = encode_and_step(joined.model, spec)
    notes += set_generation(joined.model, step.positions, joined.specials, generation, max_length)
    return AssembledCaptioner(
        *(joined.model, encode, step, tokenizer, processor, joined.specials, spec),
        new=frozenset(new),
        max_length=max_length,
        notes=tuple(notes),
    )


def _from_captioner(name: str, options: ModelOptions, generation: GenerationOptions, quiet: bool) -> AssembledCaptioner:
    files = find_model(name, quiet=quiet)
    spec = PixelSpec.from_config(files.processor)
    tokenizer: Any = read_tokenizer(files)
    model = load_weights(files, "float32", torch.device("cpu"))
    encode, step = encode_and_step(model, spec)
    _check_pixels(name, encode.size, spec, any_size=encode.any_size)
    max_length = _max_length(name, step.positions, options.max_length)
    prepare_for_training(model)
    specials = _specials_of(generation_of(files, model), tokenizer, model.config)
    notes = set_generation(model, step.positions, specials, generation, None)
    return AssembledCaptioner(
        model,
        encode,
        step,
        tokenizer,
        dict(files.processor),
        specials,
        spec,
        frozenset(),
        max_length,
        tuple(notes),
    )


def _specials_of(generation: dict[str, Any], tokenizer: Any, config: Any) -> SpecialTokens:
    """The special tokens in a trained captioner's generation settings; its tokenizer's where those name none."""
    end: Any = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    end = end[0] if isinstance(end, list) and end else end
    starts = (generation.get("decoder_start_token_id"), generation.get("bos_token_id"))
    start = next((i for i in starts if i is not None), None)
    if end is None or start is None:
        return special_tokens(tokenizer, config.get_text_config(decoder=True))
    pad = generation.get("pad_token_id")
    return SpecialTokens(start, end, end if pad is None else pad, generation.get("forced_bos_token_id"))


def _processor(encoder: PartConfig) -> tuple[dict[str, Any], list[str]]:
    """The encoder's image processor, else ViT's at the encoder's image size; and a note where weights came without one."""
    if encoder.files is not None and encoder.files.processor:
        return dict(encoder.files.processor), []
    size = image_size_of(config_of(encoder))
    height, width = (size, size) if isinstance(size, int) else size
    processor = {
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
        return processor, []
    line = f"{encoder.title} has no {PROCESSOR}: images are resized to {width}x{height}, normalized with mean 0.5 and std 0.5"
    return processor, [line]


def _check_pixels(title: str, size: int | Sequence[int], spec: PixelSpec, *, any_size: bool) -> None:
    """Raises CapcliError unless the processor gives every image the size that the encoder takes."""
    pixel_size(title, size, spec, any_size=any_size)
    if spec.height is None:
        raise CapcliError(
            f"The image processor of {title} leaves images of different sizes, which cannot form a batch: give its "
            f"{PROCESSOR} a size with height and width, or do_center_crop"
        )


def _max_length(title: str, positions: int, max_length: int | None) -> int:
    if max_length is None:
        return min(DEFAULT_LENGTH, positions)
    if max_length > positions:
        raise UsageError(
            f"--max-length is {max_length}, but {title} accepts {positions} tokens: give {positions} or less"
        )
    return max_length


def _tokenizer_for(
    decoder: PartConfig, options: ModelOptions, captions: Callable[[], Iterable[str]], quiet: bool
) -> tuple[Any, bool]:
    """The tokenizer that the options name, and whether the decoder needs new embeddings for it."""
    if options.tokenizer == NEW:
        return new_tokenizer(captions(), options.vocab_size), True
    own_tokenizer = _tokenizer_of(decoder)
    tokenizer = own_tokenizer if options.tokenizer is None else load_tokenizer(options.tokenizer, quiet=quiet)
    if tokenizer is None:
        raise UsageError(f"{decoder.title} has no tokenizer: give --tokenizer, a name, a folder, or {NEW}")
    return tokenizer, needs_new_embeddings(tokenizer, own_tokenizer, config_of(decoder).vocab_size)


def _tokenizer_of(part: PartConfig) -> Any:
    """The tokenizer in a part's folder; None where there is none."""
    if part.folder is None or not has_tokenizer(os.listdir(part.folder)):
        return None
    return read_tokenizer(part.tokenizer_files)


def _question_embeddings(part: PartConfig, tokenizer: Any, decoder: PartConfig, *, new_embeddings: bool) -> bool:
    """Whether a question encoder needs new embeddings. Raises UsageError where it does and the decoder does not."""
    if part.files is None:
        return False
    needed = needs_new_embeddings(tokenizer, _tokenizer_of(part), config_of(part).vocab_size)
    if needed and not new_embeddings:
        raise UsageError(
            f"--question-encoder {part.title} has another vocabulary than {decoder.title}: give one with the same "
            f"vocabulary, or --tokenizer {NEW}, which gives both new embeddings"
        )
    return needed


def prepare_for_training(model: Any) -> None:
    """Freezes weights that captions do not use, and makes every token embedding trainable.

    The encoder's pooler and the like get no gradient; they stay in the files because transformers expects them there. BERT's
    padding embedding would get none either, but in many vocabularies that token is also the start or the end token.
    """
    model.eval()  # loaded models are in eval mode too
    for name in unused_weights(model):
        model.get_parameter(name).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
