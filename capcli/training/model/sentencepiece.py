"""A SentencePiece model file (rinna's GPT-2 has one) -> a fast tokenizer of the same tokens, which needs the file no more.

transformers' T5Tokenizer is no way to read them: it takes id 2 for the unknown token whatever the file says (in rinna's that is
the end token), adds 100 tokens of T5's own, and puts an end token after every text.
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
# What a tokenizer_config.json may call them; a model that names no padding often has it among its control pieces.
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
CONTROL_NAMES = {"pad_token": ("<pad>", "[PAD]"), "cls_token": ("[CLS]",), "sep_token": ("[SEP]",)}


def convert_pieces(path: str, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece model, unigram or BPE; `config` is what its tokenizer_config.json says, or empty.

    Text is lower-cased where "do_lower_case" there says so, and where the model knows no capitals: rinna's was trained on
    lower-cased text, and does not say so in any file. Raises CapcliError for a file that is no such model.
    """
    model = read_model(path)
    core = Tokenizer(_algorithm(model, path))
    core.normalizer = _normalizer(model, lower=bool(config.get("do_lower_case")) or _knows_no_capitals(model))
    core.decoder = _decoder(model)
    fast: Any = PreTrainedTokenizerFast
    return fast(  # type: ignore[no-any-return]
        tokenizer_object=core, clean_up_tokenization_spaces=False, **_special_names(model, config)
    )


def read_model(path: str) -> Any:
    """The ModelProto in the file. Raises CapcliError when there is none, or no package to read it with."""
    try:
        layout: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        damage: Any = importlib.import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise CapcliError(
            f"{path} needs a package that is not installed: pip install 'capcli[train]' ({error})"
        ) from error
    model = layout.ModelProto()
    try:
        with open(path, "rb") as file:
            model.ParseFromString(file.read())
    except OSError as error:
        raise CapcliError(f"Cannot read {path}: {error.strerror}.") from error
    except damage as error:
        raise CapcliError(f"{path} is no SentencePiece model, or cut short: replace the file.") from error
    if not model.pieces or model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise CapcliError(f"{path} is no SentencePiece model of the kinds unigram and BPE.")
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


def _knows_no_capitals(model: Any) -> bool:
    """Whether it has the letters from a to z but not those from A to Z (some one may come from a sign such as ℃)."""
    letters = {piece.piece for piece in model.pieces}
    return len(letters & set(ascii_lowercase)) > 20 and len(letters & set(ascii_uppercase)) < 3


def _normalizer(model: Any, *, lower: bool) -> normalizers.Normalizer:
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if lower else []
    if spec.precompiled_charsmap:
        mapping = normalizers.Precompiled(spec.precompiled_charsmap)
        steps.append(mapping)
        if mapping.normalize_str("e\u0301") == "\u00e9":
            steps.append(
                normalizers.NFC()
            )  # it composes, but tokenizers' lookup leaves apart clusters of 6 bytes and more
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
    """The special tokens: as the config names them, else as the model does; only those that the vocabulary has."""
    held = {piece.piece: piece.type for piece in model.pieces}
    spec = model.trainer_spec
    numbered = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    names = {role: model.pieces[i].piece for role, i in numbered.items() if 0 <= i < len(model.pieces)}
    for role, choices in CONTROL_NAMES.items():
        there = [name for name in choices if held.get(name) == CONTROL]
        if there:
            names.setdefault(role, there[0])
    for role in ROLES:
        value = config.get(role)
        name = value.get("content") if isinstance(value, Mapping) else value
        if name in held:
            names[role] = name
    names = {role: name for role, name in names.items() if held[name] in (UNKNOWN, CONTROL, USER_DEFINED)}
    extra = [name for name, kind in held.items() if kind == CONTROL and name not in names.values()]
    return names | ({"additional_special_tokens": extra} if extra else {})
