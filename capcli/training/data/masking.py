"""Masked captions, as T5 was pretrained with: sentinel tokens <extra_id_0>, ... replace some words, and the answer lists them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from capcli.errors import UsageError
from capcli.models.checkpoint import quiet_transformers
from capcli.records import Failure
from capcli.training.data.pairs import Images, Pair, Pairs, Tokens
from capcli.training.model.tokenizers import SpecialTokens

SHARE = 0.15  # of a caption's words are masked, but at least one
WORD = re.compile(r"\S+")
BATCH = 4096  # captions per call of the tokenizer


class MaskedPairs(Pairs):
    """Every caption of every image, to be restored from its masked form.

    Which words are masked depends only on `seed`, the caption's index and the draw. `words[i]` holds, for each caption of
    image i, the token ids of each of its words. `gaps` are the ids of <extra_id_0> and on, `end` the end token. An answer is
    truncated to `max_length` tokens.
    """

    def __init__(
        self,
        images: Images,
        words: Sequence[Sequence[Sequence[Sequence[int]]]],
        gaps: Sequence[int],
        end: int,
        max_length: int,
        seed: int,
    ) -> None:
        super().__init__(
            images, [[[i for word in caption for i in word] for caption in captions] for captions in words]
        )
        flat = [caption for captions in words for caption in captions]
        self._lengths = np.fromiter((len(word) for caption in flat for word in caption), np.int32)
        self._words = np.cumsum([0, *map(len, flat)])
        self._gaps, self._end, self._max_length, self._seed = tuple(gaps), end, max_length, seed

    def count_truncated(self, end: int) -> int:
        """How many answers of the first draw are truncated."""
        counts = np.diff(self._words)
        masked = np.clip(np.round(SHARE * counts), 1, len(self._gaps) - 1)
        # only captions this long can have an answer of more than max_length tokens
        long = np.flatnonzero(np.diff(self._ends) + masked + 2 > self._max_length)
        return sum(int(self.masked(int(index))[1][-1] != end) for index in long)

    def pair(self, index: int, draw: int = 0) -> Pair:
        """A caption with the words masked that draw number `draw` chooses."""
        encoder_ids, answer = self.masked(index, draw)
        loaded = self.images.loaded(self.image(index))
        if isinstance(loaded, Failure):
            return Pair(None, answer, loaded, encoder_ids)
        return Pair(loaded.pixels, answer, None, encoder_ids)

    def masked(self, index: int, draw: int = 0) -> tuple[list[int], Tokens]:
        """The caption with sentinels and an end token, and the answer.

        The answer is each sentinel followed by the words it replaces, then one more sentinel and the end token. Neighbouring
        masked words share a sentinel.
        """
        lengths = self._lengths[self._words[index] : self._words[index + 1]]
        words = np.split(self.tokens(index), np.cumsum(lengths)[:-1])
        masked = choose(len(words), np.random.default_rng((self._seed, index, draw)), len(self._gaps) - 1)
        encoder_ids: list[int] = []
        answer: list[int] = []
        number = 0
        for at, word in enumerate(words):
            if not masked[at]:
                encoder_ids += word.tolist()
                continue
            if not (at and masked[at - 1]):
                encoder_ids.append(self._gaps[number])
                answer.append(self._gaps[number])
                number += 1
            answer += word.tolist()
        answer += [self._gaps[number], self._end]
        return [*encoder_ids, self._end], np.array(answer[: self._max_length], np.int32)


def choose(count: int, random: np.random.Generator, most: int) -> list[bool]:
    """Which of `count` words to mask: SHARE of them, at least one, at most `most`."""
    number = min(max(1, round(SHARE * count)), most, count)
    chosen = set(random.choice(count, number, replace=False).tolist())
    return [at in chosen for at in range(count)]


def encode_words(tokenizer: Any, captions: Sequence[str], specials: SpecialTokens) -> list[list[list[int]]]:
    """The token ids of each caption, word by word. In text without spaces every token is a word.

    Raises UsageError for a tokenizer that does not give offsets into the text.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer ({type(tokenizer).__name__}) gives no word boundaries: masked tasks need a fast one"
        )
    special = {specials.start, specials.end, specials.pad, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    result = []
    with quiet_transformers():
        for first in range(0, len(captions), BATCH):
            batch = list(captions[first : first + BATCH])
            encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
            for text, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                starts = [match.start() for match in WORD.finditer(text)]
                words: dict[int, list[int]] = {}
                for at, (token, (begin, end)) in enumerate(zip(ids, offsets, strict=True)):
                    if token in special:
                        continue
                    last = end - 1 if text[begin:end].strip() else end  # a space belongs to the word after it
                    word = at if len(starts) < 2 else bisect_right(starts, max(last, starts[0]))
                    words.setdefault(word, []).append(token)
                result.append(list(words.values()))
    return result


def gaps_of(tokenizer: Any) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ... Raises UsageError for a tokenizer with fewer than two."""
    known = tokenizer.get_vocab()
    gaps: list[int] = []
    while (name := f"<extra_id_{len(gaps)}>") in known:
        gaps.append(known[name])
    if len(gaps) < 2:
        raise UsageError("masked tasks need a vocabulary with <extra_id_0>, <extra_id_1>, ..., such as a T5's")
    return gaps
