"""The Stanford PTB tokenizer as COCO's scorers use it, in Python instead of Java.

The rules were derived from the output of the tokenizer in pycocoevalcap (CoreNLP 3.4.1 with `-preserveLines -lowerCase`, and
COCO's punctuation removed), not from its source. They are right for prose. Two differences: parts of telephone numbers and
the like, which the original joins across spaces, are separate tokens here; and a letter's full stop at the end of a
caption does not depend on the next caption.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping

# What COCO removes. Its list has brackets in upper case, the tokens are in lower case: brackets stay, here as there.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
MONEY = {"£": "#", "€": "$", "¢": "cents", "\xa4": "$"}
FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
SIGNS = BRACKETS | MONEY | FRACTIONS
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "'"}

# Abbreviations that keep their full stop everywhere,
ABBREVIATIONS = (
    "adj|adm|adv|ala?|alex|apr|ariz|assn|asst|assoc|aug|ave|bhd|bldg|blvd|bros|calif|capt|cf|cie|cmdr|col?|colo|comdr|conn|"
    "corp|cos|cpl|ct|dak|dec|dept|det|drs?|elec|ens|esq|etc?|ext|feb|fla|fri|ft|ga|gen|gov|hon|inc|ind|insp|intl|jan|jos|jr|"
    "jul|jun|kans?|ky|ltd?|maj|mar|md|messrs|mfg|mich|minn|mlle|mme|mo|mont?|mrs?|ms|mt|natl|neb|nev|nov|oct|okla|penn|pfc|"
    "ph|plc|pres|prof|pty|pvt|rd|reps?|rev|sept?|sen|sgt|spc|sq|sr|st|supt|tel|tenn|thu|thurs|tue|tues|univ|va|vs|vt|wed|"
    "wisc?|wm|wyo"
)
# only with a capital letter (in lower case they are words),
CAPITAL_ABBREVIATIONS = "Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
# or only before a number.
BEFORE_NUMBERS = "art|ca|figs?|nos?|op|pp|prop"
# After a letter and a full stop these words begin a sentence: the stop does not belong to the letter.
BEGINNINGS = (
    "A|About|After|An|As|At|But|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|One|Other|Our|She|Since|So|Some|That|"
    "The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)

_MARKS = "".join(re.escape(chr(c)) for c in range(0x300, 0x3100) if unicodedata.category(chr(c))[0] == "M")
_NUMERALS = "".join(chr(c) for c in range(0xB2, 0x3400) if unicodedata.category(chr(c)) in ("No", "Nl"))
MARK = f"[{_MARKS}]"
LETTER = rf"(?:[^\W\d_{_NUMERALS}]|[{_MARKS}])"
ALPHANUMERIC = rf"(?:[^\W_{_NUMERALS}]|[{_MARKS}])"
_L, _W, _END = LETTER, ALPHANUMERIC, rf"(?!{ALPHANUMERIC})"
_Q = r"['\u2019]"
_CLITIC = rf"{_Q}(?i:s|m|d|re|ve|ll){_END}"

# Tried in this order. The name is the treatment of a match (TREATMENTS); without a name the match is the token.
RULES: tuple[tuple[str, str], ...] = (
    ("nothing", r"\s+"),
    # Most words; first for speed. What follows them cannot make them part of another token.
    ("", r"(?!(?i:cannot|gonna|gotta|wanna|lemme|gimme)\b)[A-Za-z]{2,}(?=[ ,;]|$)"),
    ("entity", "|".join(ENTITIES)),
    ("joined", r"</?[A-Za-z][^<>\n]*>|<!--[^<>\n]*-->"),
    ("", r"https?://(?=[^\s\"<>|(){}]*\.)[^\s\"<>|(){}]*[^\s\"<>|(){}.?!,;:'-]"),
    ("", rf"{_W}[\w.-]*@{_W}+(?:\.{_W}+)*|@{_L}\w*|\#{_L}+"),
    ("emoticon", rf"[:;=][-']?[()\[\]DOPp](?!{_W})|\^_\^|-_-"),
    ("joined", r"\d{1,4}[ \xa0]\d{1,4}/\d{1,4}(?![\w/])"),
    # Two words written as one.
    ("", rf"(?i:can(?=not{_END})|(?:gon|got|wan)(?=(?:na|ta){_END})|(?:lem|gim)(?=me{_END})(?!me{_Q}))"),
    ("", rf"(?i:[cf]#|c\+\+|c{_Q}mon{_END})|(?:US|HK|NZ|A|C)\$|[A-Z]+&[A-Z]+{_END}"),
    # Apostrophes: a clitic is always a token; some words begin with an apostrophe, others contain one.
    ("", _CLITIC),
    ("", rf"(?i:n['\u2019`]t){_END}"),
    ("", rf"(?i:'t(?=is{_END}|was{_END}))"),
    ("", rf"(?i:'(?:em|til|cause){_END})|(?<!\w){_Q}\d\ds?{_END}|(?i:'n(?:'|{_END}))|(?i:ol'){_END}"),
    ("", rf"{_L}+?(?=(?i:n['\u2019`]t){_END})"),
    ("", rf"(?!.{_CLITIC})(?:[A-HJ-NP-XZn]|[dlDL]){_Q}{_L}{{2,}}(?:(?<=[dlDL]{_Q})-{_W}+)?"),
    ("", rf"(?!.{_CLITIC})[oO]{_Q}{_L}{{2,}}(?:-{_W}+)*"),
    ("", rf"(?i:{_L}+[aeiouy]{_Q}[aeiou]{_L}*)(?<!{_Q}d)"),
    ("", rf"(?i:[yj]){_Q}(?={_L})"),
    # Full stops inside words and of abbreviations.
    ("", rf"(?i:ph\.d\.)|(?:{_W}+-)?[A-Za-z](?:\.[A-Za-z])+\.(?!{_W})(?:-{_W}+)*"),
    ("", rf"{_L}{_W}*(?:\.{_L}{_W}*)+(?:-{_W}+)*"),
    ("", rf"(?i:{ABBREVIATIONS})\.(?!{_W})"),
    ("", rf"(?:{CAPITAL_ABBREVIATIONS}|{CAPITAL_ABBREVIATIONS.upper()})\.(?!{_W})"),
    ("", rf"(?i:{BEFORE_NUMBERS})\.(?=\s*\d)"),
    ("", rf"[A-Za-z]\.(?!\s+(?:{BEGINNINGS}|{BEGINNINGS.upper()})\s)"),
    ("", rf"{_L}+[!?]{_L}+"),
    # Words with and without hyphens, numbers.
    ("", rf"{_W}*{_L}{_W}*(?:[-_\u2010\u2011]{_W}+|/{_W}+)*|\d+(?:[-_]{_W}+|/{_W}+)+"),
    ("", r"[-+]?\d*(?:[.,:]\d+)+|[-+]?\d+"),
    # Signs.
    ("", r"[?!]+|-{5,}|\*+|_+|@+|\#+|<<|>>"),
    ("nothing", r"-+|[\u2013\u2014\u2015]"),
    ("sign", r"\S"),
)

_QUOTES = re.compile('["\u2018\u2019\u201b\u201c\u201d«»\u2039\u203a\u2026\x80-\x9f]')
_SYMBOLS = re.compile(
    rf"[!-~§¶·¡¿\u2020-\u2023\u2030-\u2033\u203b\u203e\u3001\u3002\u30fb\uff01-\uff0f\uff1a-\uff20\uff3c{_NUMERALS}]"
)


def _sign(sign: str) -> str:
    """A single sign; empty for quotes and for what the original drops: emoji, control characters, rare brackets."""
    if sign in SIGNS:
        return SIGNS[sign]
    if _QUOTES.match(sign):
        return ""
    symbol = unicodedata.category(sign)[0] == "S" and sign < "\u2c00" and not "\u20a0" <= sign <= "\u20c0"
    return sign if symbol or _SYMBOLS.match(sign) else ""


TREATMENTS: Mapping[str, Callable[[str], str]] = {
    "": lambda token: token.replace("\u2019", "'"),
    "nothing": lambda _: "",
    "entity": ENTITIES.__getitem__,
    "joined": lambda words: words.replace(" ", "\xa0"),
    "emoticon": lambda face: face.replace("(", "-lrb-").replace(")", "-rrb-"),
    "sign": _sign,
}
_TOKEN = re.compile("|".join(f"({rule})" for _, rule in RULES))
_TREAT = [TREATMENTS[name] for name, _ in RULES]


def ptb(line: str) -> str:
    """A caption's PTB tokens: lower case, without punctuation, separated by spaces."""
    tokens = (_TREAT[(match.lastindex or 1) - 1](match[0]).lower() for match in _TOKEN.finditer(line))
    return " ".join(token for token in tokens if token and token not in PUNCTUATION)
