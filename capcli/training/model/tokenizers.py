"""Tokenizers for training: reading one from any format, training a new one, its special tokens, captions to labels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from capcli.errors import CapcliError
from capcli.models.checkpoint import explained, has_offset_pieces, quiet_transformers
from capcli.models.checkpoint import load_tokenizer as read_whole
from capcli.models.hub import find_model
from capcli.models.model_files import IncompleteError, ModelFiles, ModelListing, setting_files
from capcli.training.model.sentencepiece import convert_pieces

START, END, PAD = "<s>", "</s>", "<pad>"  # special tokens of a new tokenizer
BATCH = 4096  # captions per call of the tokenizer


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the start token, the end token and padding; any two may be the same token.

    `first` is the forced_bos_token_id of captioners that have one: every caption begins with it, after the start token.
    """

    start: int
    end: int
    pad: int
    first: int | None = None

    def line(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """For example: special tokens: start <s> (1), end </s> (2), pad [PAD] (3)."""
        names = {"start": self.start, "end": self.end, "pad": self.pad}
        shown = [f"{role} {tokenizer.convert_ids_to_tokens(i)} ({i})" for role, i in names.items()]
        return f"special tokens: {', '.join(shown)}"


def special_tokens(tokenizer: Any, decoder_config: Any = None) -> SpecialTokens:
    """The tokenizer's start and end tokens, else BERT's [CLS] and [SEP], else those of the decoder's config.

    Without a start token or padding the end token is used, as in GPT-2. Raises CapcliError where there is no end token.
    """
    end = _first(tokenizer, decoder_config, ("eos_token_id", "sep_token_id"), ("eos_token_id",))
    if end is None:
        raise CapcliError(
            f"The tokenizer {_name(tokenizer)} has no end token (neither eos_token nor sep_token), so captions could not "
            "end: name one in its tokenizer_config.json, or give another tokenizer (or `new`)."
        )
    starts = ("decoder_start_token_id", "bos_token_id")
    start = _first(tokenizer, decoder_config, ("bos_token_id", "cls_token_id"), starts)
    pad = _first(tokenizer, None, ("pad_token_id",), ())
    return SpecialTokens(end if start is None else start, end, end if pad is None else pad)


def _first(tokenizer: Any, config: Any, names: Sequence[str], config_names: Sequence[str]) -> int | None:
    """The first id that is set; one from the config counts only if the tokenizer has it.

    uer's Chinese GPT-2 has an eos_token_id of 50256 and 21128 tokens.
    """
    found = [getattr(tokenizer, name, None) for name in names]
    found += [i for i in (getattr(config, name, None) for name in config_names) if _has(tokenizer, i)]
    return next((int(i) for i in found if i is not None), None)


def _has(tokenizer: Any, token: object) -> bool:
    return isinstance(token, int) and 0 <= token < len(tokenizer)


def _name(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def new_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, trained on the captions; it can encode any text.

    A word is the same token at the start of a caption and elsewhere, and decoded text does not start with a space.
    Raises CapcliError when there are no captions.
    """
    captions = iter(captions)
    first = next(captions, None)
    if first is None:
        raise CapcliError("There are no captions to train a tokenizer on.")
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
    core.train_from_iterator(chain((first,), captions), trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(  # type: ignore[no-any-return]
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def encode_captions(
    tokenizer: Any, captions: Sequence[str], specials: SpecialTokens, max_length: int
) -> list[list[int]]:
    """The labels of each caption: its tokens without the start token, then the end token; at most `max_length` in all.

    A longer caption is truncated and gets no end token, because it does not end there. Text that looks like a special token
    is encoded as ordinary text.
    """
    special = {specials.start, specials.end, specials.pad, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    labels, before = [], [] if specials.first is None else [specials.first]
    with quiet_transformers():  # it warns of captions that are longer than its model's limit
        for first in range(0, len(captions), BATCH):
            batch = list(captions[first : first + BATCH])
            rows = tokenizer(batch, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            labels += [[*before, *(i for i in row if i not in special), specials.end][:max_length] for row in rows]
    return labels


def load_tokenizer(name: str, *, quiet: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a model on the hub.

    Raises UsageError for an invalid name, CapcliError when there is no tokenizer or it cannot be used.
    """
    return read_tokenizer(find_model(name, quiet=quiet, take=fetch_tokenizer, option="--tokenizer"))


def fetch_tokenizer(name: str, listing: ModelListing, revision: str | None) -> ModelFiles:
    """Fetches a tokenizer's files. Raises IncompleteError when there are none."""
    files = setting_files(listing.names)
    if not has_tokenizer(listing.names):
        raise IncompleteError(
            f"{listing.title} has no tokenizer: tokenizer.json, vocab.json with merges.txt, vocab.txt, or a SentencePiece .model."
        )
    config = listing.read_json("config.json") if "config.json" in listing.names else {}
    paths = [listing.fetch(file) for file in files]
    return ModelFiles(name, os.path.dirname(paths[0]), revision, config, {})


def has_tokenizer(names: Iterable[str]) -> bool:
    return _reader(set(names)) is not None


def read_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises CapcliError when it cannot be used."""
    read = _reader(set(os.listdir(files.folder)))
    if read is None:
        raise IncompleteError(f"{files.name} has no tokenizer.")
    with explained(files), quiet_transformers():
        offset = read is _from_pieces and has_offset_pieces(files.folder, files.config)
        tokenizer: Any = read_whole(files) if offset else read(files.folder)
        tokenizer.name_or_path = files.name
    for name in ("is_local", "local_files_only"):  # options of this loading, which would be saved with the tokenizer
        tokenizer.init_kwargs.pop(name, None)
    if not len(tokenizer):
        raise CapcliError(f"The tokenizer of {files.name} has no tokens: replace its files.")
    return tokenizer  # type: ignore[no-any-return]


def _reader(names: set[str]) -> Callable[[str], Any] | None:
    """The function that reads the tokenizer in a folder with these files; None when there is none.

    tokenizer.json is complete and comes first; then a SentencePiece model, whatever class tokenizer_config.json names.
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
    model_files = sorted(name for name in os.listdir(folder) if name.endswith(".model"))
    if len(model_files) > 1:
        raise CapcliError(f"{folder} has several SentencePiece models ({', '.join(model_files)}): leave only one.")
    return convert_pieces(os.path.join(folder, model_files[0]), config if isinstance(config, dict) else {})
