"""Converts a SentencePiece model file, such as that of rinna's GPT-2, to a fast tokenizer with the same tokens.

transformers' T5Tokenizer cannot read such files in general: it uses id 2 as the unknown token regardless of the file (in
rinna's that is the end token), adds T5's 100 sentinel tokens, and appends an end token to every text.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from capcli.errors import CapcliError

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # ModelProto.SentencePiece.Type
SPACE = "▁"
# Special tokens by their keys in tokenizer_config.json; a model without padding often has it among its control pieces.
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
CONTROL_NAMES = {"pad_token": ("<pad>", "[PAD]"), "cls_token": ("[CLS]",), "sep_token": ("[SEP]",)}


def convert_pieces(path: str, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece model, unigram or BPE; `config` is its tokenizer_config.json, or empty.

    Text is lower-cased if "do_lower_case" is set there, or if the model has no capital letters: rinna's was trained on
    lower-cased text, and none of its files states this. Raises CapcliError for a file that is not such a model.
    """
    model = read_model(path)
    core = Tokenizer(_algorithm(model, path))
    core.normalizer = _normalizer(model, lower=bool(config.get("do_lower_case")) or _has_no_capitals(model))
    core.decoder = _decoder(model)
    fast: Any = PreTrainedTokenizerFast
    return fast(  # type: ignore[no-any-return]
        tokenizer_object=core, clean_up_tokenization_spaces=False, **_special_names(model, config)
    )


def read_model(path: str) -> Any:
    """The ModelProto in a file. Raises CapcliError when it cannot be read, or the package for it is not installed."""
    try:
        protobuf: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        decode_error: Any = importlib.import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise CapcliError(
            f"{path} needs a package that is not installed: pip install 'capcli[train]' ({error})"
        ) from error
    model = protobuf.ModelProto()
    try:
        with open(path, "rb") as file:
            model.ParseFromString(file.read())
    except OSError as error:
        raise CapcliError(f"Cannot read {path}: {error.strerror}.") from error
    except decode_error as error:
        raise CapcliError(f"{path} is not a SentencePiece model, or incomplete: replace the file.") from error
    if not model.pieces or model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise CapcliError(f"{path} is not a SentencePiece model of the kind unigram or BPE.")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise CapcliError(f"{path} puts spaces at the end of its pieces, which is not supported.")
    return model


def _algorithm(model: Any, path: str) -> Any:
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN), None)
    if unknown is None:
        raise CapcliError(f"{path} has no unknown token: it is damaged.")
    fallback = model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == UNIGRAM:
        return models.Unigram(pieces, unknown, byte_fallback=fallback)
    from transformers.convert_slow_tokenizer import generate_merges

    vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
    return models.BPE(
        vocabulary,
        generate_merges(vocabulary, pieces),
        unk_token=pieces[unknown][0],
        fuse_unk=True,
        byte_fallback=fallback,
    )


def _has_no_capitals(model: Any) -> bool:
    """Whether it has the letters a to z but not A to Z, of which up to two may come from symbols such as ℃."""
    letters = {piece.piece for piece in model.pieces}
    return len(letters & set(ascii_lowercase)) > 20 and len(letters & set(ascii_uppercase)) < 3


def _normalizer(model: Any, *, lower: bool) -> normalizers.Normalizer:
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if lower else []
    if spec.precompiled_charsmap:
        mapping = normalizers.Precompiled(spec.precompiled_charsmap)
        steps.append(mapping)
        if mapping.normalize_str("e\u0301") == "\u00e9":
            # the model composes characters, but tokenizers' lookup does not for clusters of 6 bytes and more
            steps.append(normalizers.NFC())
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(model: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _special_names(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens by key: as the config names them, else as the model does; only those in the vocabulary."""
    types = {piece.piece: piece.type for piece in model.pieces}
    spec = model.trainer_spec
    numbered = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    names = {role: model.pieces[i].piece for role, i in numbered.items() if 0 <= i < len(model.pieces)}
    for role, choices in CONTROL_NAMES.items():
        found = [name for name in choices if types.get(name) == CONTROL]
        if found:
            names.setdefault(role, found[0])
    for role in ROLES:
        value = config.get(role)
        name = value.get("content") if isinstance(value, Mapping) else value
        if name in types:
            names[role] = name
    names = {role: name for role, name in names.items() if types[name] in (UNKNOWN, CONTROL, USER_DEFINED)}
    extra = [name for name, kind in types.items() if kind == CONTROL and name not in names.values()]
    return names | ({"additional_special_tokens": extra} if extra else {})
