"""Captions with gaps: some words become <extra_id_0>, <extra_id_1>, ... and the answer says which words those were (T5's way)."""

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

SHARE = 0.15  # of a caption's words; never none of them
WORD = re.compile(r"\S+")
BATCH = 4096  # captions that are encoded at once


class MaskedPairs(Pairs):
    """Every caption of every image, to be restored. Which words are gone depends on `seed`, the caption and the draw alone.

    `words[i]` holds, for each caption of image i, the token ids of its words. `gaps` are the ids of <extra_id_0> and on.
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
        super().__init__(images, [[[i for word in caption for i in word] for caption in each] for each in words])
        flat = [caption for each in words for caption in each]
        self._lengths = np.fromiter((len(word) for caption in flat for word in caption), np.int32)
        self._words = np.cumsum([0, *map(len, flat)])
        self._gaps, self._end, self._most, self._seed = tuple(gaps), end, max_length, seed

    def cut(self, end: int) -> int:
        """How many answers do not end, as they are drawn first. Few captions are so long that this can be."""
        counts = np.diff(self._words)
        gone = np.clip(np.round(SHARE * counts), 1, len(self._gaps) - 1)
        long = np.flatnonzero(np.diff(self._ends) + gone + 2 > self._most)
        return sum(int(self.masked(int(index))[1][-1] != end) for index in long)

    def pair(self, index: int, draw: int = 0) -> Pair:
        """A caption as it is masked when it is drawn for the `draw`th time."""
        encoder_ids, answer = self.masked(index, draw)
        loaded = self.images.loaded(self.image(index))
        if isinstance(loaded, Failure):
            return Pair(None, answer, loaded, encoder_ids)
        return Pair(loaded.pixels, answer, None, encoder_ids)

    def masked(self, index: int, draw: int = 0) -> tuple[list[int], Tokens]:
        """The encoder's ids with gaps, and the answer: each gap's token and its words, then one gap more, and the end."""
        lengths = self._lengths[self._words[index] : self._words[index + 1]]
        words = np.split(self.tokens(index), np.cumsum(lengths)[:-1])
        gone = choose(len(words), np.random.default_rng((self._seed, index, draw)), len(self._gaps) - 1)
        encoder_ids: list[int] = []
        answer: list[int] = []
        number = 0
        for at, word in enumerate(words):
            if not gone[at]:
                encoder_ids += word.tolist()
                continue
            if not (at and gone[at - 1]):
                encoder_ids.append(self._gaps[number])
                answer.append(self._gaps[number])
                number += 1
            answer += word.tolist()
        answer += [self._gaps[number], self._end]
        return [*encoder_ids, self._end], np.array(answer[: self._most], np.int32)


def choose(count: int, draw: np.random.Generator, most: int) -> list[bool]:
    """Which of `count` words are gone: SHARE of them, at least one; at most `most`, so that every gap has a token."""
    number = min(max(1, round(SHARE * count)), most, count)
    chosen = set(draw.choice(count, number, replace=False).tolist())
    return [at in chosen for at in range(count)]


def encode_words(tokenizer: Any, captions: Sequence[str], specials: SpecialTokens) -> list[list[list[int]]]:
    """The tokens of each caption, word by word. Where a script has no spaces between words every token is one."""
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer ({type(tokenizer).__name__}) does not tell where words are: masked needs a fast one"
        )
    never = {specials.start, specials.end, specials.pad, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    found = []
    with quiet_transformers():
        for first in range(0, len(captions), BATCH):
            batch = list(captions[first : first + BATCH])
            encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
            for text, ids, places in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                starts = [match.start() for match in WORD.finditer(text)]
                words: dict[int, list[int]] = {}
                for at, (token, (begin, end)) in enumerate(zip(ids, places, strict=True)):
                    if token not in never:  # and a space by itself is of the word behind it
                        last = end - 1 if text[begin:end].strip() else end
                        word = at if len(starts) < 2 else bisect_right(starts, max(last, starts[0]))
                        words.setdefault(word, []).append(token)
                found.append(list(words.values()))
    return found


def gaps_of(tokenizer: Any) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ... Raises UsageError where a tokenizer has none."""
    known = tokenizer.get_vocab()
    gaps: list[int] = []
    while (name := f"<extra_id_{len(gaps)}>") in known:
        gaps.append(known[name])
    if len(gaps) < 2:
        raise UsageError("masked needs a vocabulary with <extra_id_0>, <extra_id_1>, ..., as a T5 has it")
    return gaps
