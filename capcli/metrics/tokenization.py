"""Captions as tokens: the words that COCO's scorers compare, or characters for scripts without spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from capcli.metrics import ptb
from capcli.metrics.ptb import ALPHANUMERIC, LETTER, MARK
from capcli.text import as_text

Tokenize = Literal["ptb", "characters"]

_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029\0]+")


def one_line(text: str) -> str:
    """The text in one line: line breaks become spaces, surrogates become U+FFFD, soft hyphens are removed."""
    return as_text(_BREAKS.sub(" ", text)).replace("\xad", "")


# Scripts without spaces between words: Han, kana, bopomofo, Thai, Lao, Burmese, Khmer.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30fa\u30fc-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
_CHARACTER = re.compile(rf"(?=[{_UNSPACED}]){ALPHANUMERIC}{MARK}*|(?:(?![{_UNSPACED}]){ALPHANUMERIC})+")
_LETTER = re.compile(LETTER)
_UNSPACED_LETTER = re.compile(rf"(?=[{_UNSPACED}]){LETTER}")


def characters(text: str) -> str:
    """A caption's characters where the script has no spaces, else its words, without punctuation, separated by spaces."""
    folded = unicodedata.normalize("NFKC", one_line(text)).lower()
    return " ".join(_CHARACTER.findall(folded))


def words(text: str) -> str:
    """A caption's PTB tokens without punctuation, separated by spaces."""
    return ptb.ptb(one_line(text))


TOKENIZERS: Mapping[Tokenize, Callable[[str], str]] = {"ptb": words, "characters": characters}


def choose_tokenizer(texts: Iterable[str]) -> Tokenize:
    """`characters` where more than half of the letters are of a script without spaces, which PTB would not split."""
    letters = unspaced = 0
    for text in texts:
        if text.isascii():
            letters += len(text)
        else:
            letters += len(_LETTER.findall(text))
            unspaced += len(_UNSPACED_LETTER.findall(text))
    return "characters" if 2 * unspaced > letters else "ptb"
