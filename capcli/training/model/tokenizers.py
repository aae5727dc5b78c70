"""Tokenizers in training: the decoder's own, a given one or a new one; its special tokens; captions as labels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from capcli.errors import CapcliError
from capcli.models.checkpoint import explained, quiet_transformers
from capcli.models.hub import find_model
from capcli.models.model_files import IncompleteError, ModelFiles, ModelListing, setting_files
from capcli.training.model.sentencepiece import convert_pieces

START, END, PAD = "<s>", "</s>", "<pad>"  # of a new tokenizer
BATCH = 4096  # captions that are encoded at once


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the token before a caption, the one after it, and padding; any two may be the same token.

    `first` is the one that every caption begins with, after the start token, in captioners that are forced to it.
    """

    start: int
    end: int
    pad: int
    first: int | None = None

    def line(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """For people: special tokens: start <s> (1), end </s> (2), pad [PAD] (3)."""
        names = {"start": self.start, "end": self.end, "pad": self.pad}
        shown = [f"{role} {tokenizer.convert_ids_to_tokens(i)} ({i})" for role, i in names.items()]
        return f"special tokens: {', '.join(shown)}"


def special_tokens(tokenizer: Any, decoder_config: Any = None) -> SpecialTokens:
    """What the tokenizer has: its own start and end, else BERT's [CLS] and [SEP], else what the decoder's config says.

    A start token that there is not is the end token, as in GPT-2; so is padding. Raises CapcliError without an end token.
    """
    end = _first(tokenizer, decoder_config, ("eos_token_id", "sep_token_id"), ("eos_token_id",))
    if end is None:
        raise CapcliError(
            f"The tokenizer {_name(tokenizer)} has no end token (neither eos_token nor sep_token), so captions could not "
            "end: name one in its tokenizer_config.json, or take another tokenizer (or `new`)."
        )
    starts = ("decoder_start_token_id", "bos_token_id")
    start = _first(tokenizer, decoder_config, ("bos_token_id", "cls_token_id"), starts)
    pad = _first(tokenizer, None, ("pad_token_id",), ())
    return SpecialTokens(end if start is None else start, end, end if pad is None else pad)


def _first(tokenizer: Any, config: Any, own: Sequence[str], configured: Sequence[str]) -> int | None:
    """The first id there is; a config's only where the tokenizer has such a token (uer's Chinese GPT-2 says 50256 of 21128)."""
    found = [getattr(tokenizer, name, None) for name in own]
    found += [i for i in (getattr(config, name, None) for name in configured) if _has(tokenizer, i)]
    return next((int(i) for i in found if i is not None), None)


def _has(tokenizer: Any, token: object) -> bool:
    return isinstance(token, int) and 0 <= token < len(tokenizer)


def _name(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def new_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, learnt from the captions: whatever is written can be said in it.

    A caption's first word is the same token as that word elsewhere, and decoding gives no space before it.
    Raises CapcliError when there are no captions.
    """
    counted = _Counting(captions)
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[START, END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(counted, trainer)
    if not counted.count:
        raise CapcliError("There are no captions to train a tokenizer on.")
    fast: Any = PreTrainedTokenizerFast
    return fast(  # type: ignore[no-any-return]
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


class _Counting:
    """An iterable that counts what it gives."""

    def __init__(self, items: Iterable[str]) -> None:
        self.items, self.count = items, 0

    def __iter__(self) -> Any:
        for item in self.items:
            self.count += 1
            yield item


def encode_captions(
    tokenizer: Any, captions: Sequence[str], specials: SpecialTokens, max_length: int
) -> list[list[int]]:
    """The labels of each caption: its tokens, without the start token, and the end token last; at most `max_length` in all.

    A caption that is longer is cut and gets no end token: it does not end there (`count_cut` counts these). Text that reads like
    a special token is never one.
    """
    never = {specials.start, specials.end, specials.pad, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    labels, before = [], [] if specials.first is None else [specials.first]
    with quiet_transformers():  # which warns of lengths that are cut here
        for first in range(0, len(captions), BATCH):
            batch = list(captions[first : first + BATCH])
            rows = tokenizer(batch, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            labels += [[*before, *(i for i in row if i not in never), specials.end][:max_length] for row in rows]
    return labels


def count_cut(labels: Iterable[Sequence[int]], specials: SpecialTokens) -> int:
    """How many captions `encode_captions` cut."""
    return sum(row[-1] != specials.end for row in labels)


def load_tokenizer(name: str, *, quiet: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a model on the hub, whatever else that holds.

    Raises UsageError for a name that cannot be, CapcliError when there is no tokenizer or it cannot be used.
    """
    return read_tokenizer(find_model(name, quiet=quiet, take=gather_tokenizer, option="--tokenizer"))


def gather_tokenizer(name: str, shelf: ModelListing, revision: str | None) -> ModelFiles:
    """Fetch a tokenizer's files. Raises IncompleteError when there are none."""
    files = setting_files(shelf.names)
    if not has_tokenizer(shelf.names):
        raise IncompleteError(
            f"{shelf.title} has no tokenizer: tokenizer.json, vocab.json with merges.txt, vocab.txt, or a SentencePiece .model."
        )
    config = shelf.read_json("config.json") if "config.json" in shelf.names else {}
    paths = [shelf.fetch(file) for file in files]
    return ModelFiles(name, os.path.dirname(paths[0]), revision, config, {})


def has_tokenizer(names: Iterable[str]) -> bool:
    return _kind(set(names)) is not None


def read_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises CapcliError when it cannot be used."""
    names = set(os.listdir(files.folder))
    read = _kind(names)
    if read is None:
        raise IncompleteError(f"{files.name} has no tokenizer.")
    with explained(files), quiet_transformers():
        tokenizer: Any = read(files.folder)
        tokenizer.name_or_path = files.name
    for how in ("is_local", "local_files_only"):  # of the loading, not of the tokenizer: it would be saved with it
        tokenizer.init_kwargs.pop(how, None)
    if not len(tokenizer):
        raise CapcliError(f"The tokenizer of {files.name} has no tokens: replace its files.")
    return tokenizer  # type: ignore[no-any-return]


def _kind(names: set[str]) -> Callable[[str], Any] | None:
    """How to read the tokenizer among these files; None when there is none.

    tokenizer.json says everything; without it a SentencePiece model goes before what tokenizer_config.json calls it.
    """
    if "tokenizer.json" in names:
        return _auto
    if any(name.endswith(".model") for name in names):
        return _from_pieces
    vocabulary = {"vocab.json", "merges.txt"} <= names or "vocab.txt" in names
    if vocabulary and "tokenizer_config.json" in names:
        return _auto
    if {"vocab.json", "merges.txt"} <= names:
        return _of_class(transformers.GPT2Tokenizer)
    return _of_class(transformers.BertTokenizer) if "vocab.txt" in names else None


def _auto(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _of_class(kind: Any) -> Callable[[str], Any]:
    return lambda folder: kind.from_pretrained(folder, local_files_only=True)


def _from_pieces(folder: str) -> Any:
    path = os.path.join(folder, "tokenizer_config.json")
    config: Any = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    models_there = sorted(name for name in os.listdir(folder) if name.endswith(".model"))
    if len(models_there) > 1:
        raise CapcliError(f"{folder} has several SentencePiece models ({', '.join(models_there)}): leave one.")
    return convert_pieces(os.path.join(folder, models_there[0]), config if isinstance(config, dict) else {})
