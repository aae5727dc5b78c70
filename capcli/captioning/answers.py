"""The rules for what language models answer in place of a caption: refusals, empty and cut answers, loops, special tokens.

Captions of all backends can be judged by them. They look at the text alone, so they are approximate.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from capcli.captioning.feed import Deliver
from capcli.errors import ImageError
from capcli.options import OnBad
from capcli.records import Candidate, Caption, Failure

Problem = Literal["refusal", "empty-answer", "cut-answer", "loop", "special-token"]  # also kinds of failures
MESSAGES: dict[Problem, str] = {
    "refusal": "the model refused",
    "empty-answer": "the answer is empty",
    "cut-answer": "the answer was cut off at the maximum number of tokens; --max-new-tokens raises it",
    "loop": "the answer repeats itself",
    "special-token": "the answer contains special tokens",
}
_SHOWN = 120  # characters of an answer in a message

REASONING_ENDS = ("</think>", "</thinking>", "</reasoning>")
_REASONING = re.compile(r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL)
_REASONING_END = re.compile(
    r"\A.*</(?:think|thinking|reasoning)>", re.DOTALL
)  # a chat template may have opened the block
_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>"  # <|im_end|>, <|endoftext|>
    r"|<｜[^｜<>\s]{1,40}｜>"  # noqa: RUF001 - DeepSeek's, in full width
    r"|</?s>|<(?:pad|unk|bos|eos|mask|image|end_of_utterance|end_of_image|start_of_image|fake_token_around_image)>"
    r"|<(?:start|end)_of_turn>|<image_soft_token>|<row_\d+_col_\d+>|</?(?:IMG_CONTEXT|img)>"
    r"|\[/?INST\]|\[(?:PAD|CLS|SEP|UNK|MASK|IMG|IMG_END|IMG_BREAK)\]"
)
_SORRY = r"(?:i am |i'm |we are |we're )?(?:very |so |really )?sorry\W+(?:but )?"
_CANNOT = r"(?:can't|cannot|can not|am not able to|am unable to|'m not able to|'m unable to|won't|will not)"
_DO = (
    r"(?:help|assist|comply|provide|identify|describe|process|view|see|analyze|caption|generate|create|answer|discuss)"
)
_NO_IMAGE = r"no image (?:was |has been |is )?(?:provided|attached|uploaded|in)"
_REFUSALS = re.compile(
    "|".join(
        (
            rf"(?:{_SORRY})?(?:unfortunately\W+)?(?:i|we) ?{_CANNOT} (?:\w+ )?{_DO}\b",
            r"(?:i am |i'm )?(?:very |so |really )?sorry\W+but (?:i|this|it|there|no|that|as)\b",
            r"(?:my )?apologies\W+(?:but )?i\b|i apologi[sz]e\W+(?:but )?i\b",
            r"as an ai\b|as a (?:large )?language model\b",
            r"i (?:don't|do not|can't|cannot) see (?:an|any|the) image",
            rf"(?:it (?:seems|looks like|appears) (?:that )?)?(?:there is |there's |there was )?{_NO_IMAGE}",
            r"please (?:upload|provide|share|attach) (?:the|an|your) image",
            r"(?:es )?tut mir leid\W+(?:aber )?ich|ich kann (?:dabei |dir |ihnen )?nicht (?:helfen|beschreiben)",
            r"(?:je suis )?désolée?\W+(?:mais )?je ne|lo siento\W+(?:pero )?no puedo",
            r"(?:很|非常)?(?:抱歉|对不起|對不起)[,\s]*(?:但是?)?(?:我|无法|無法)",
            r"我(?:无法|無法|不能)(?:提供|描述|识别|識別|协助|協助|回答)",
            r"申し訳(?:ありません|ございません)|죄송(?:합니다|하지만)",
        )
    )
)
_TOKENS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")
_LONGEST_PERIOD = 60  # tokens of a passage that is repeated
_REPEATED, _REPEATED_TOKENS = 3, 12  # times in a row, and tokens in all, from which repetition is a loop


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer without reasoning and special tokens, and what is wrong with it, if anything."""

    text: str
    problem: Problem | None = None


def judge(text: str, *, cut: bool = False) -> Answer:
    """The answer in a model's output. `cut` means that it ended at the maximum number of tokens."""
    answer = without_reasoning(text)
    plain = _SPECIAL.sub("", answer).strip()
    if cut:
        return Answer(plain, "cut-answer")
    if not plain:
        return Answer("", "empty-answer")
    if is_refusal(plain):
        return Answer(plain, "refusal")
    if is_loop(plain):
        return Answer(plain, "loop")
    return Answer(plain, "special-token" if plain != answer else None)


def accept(answer: Answer, on_bad: OnBad | None, fatal: Collection[Problem] = ()) -> str:
    """The text of an answer that is a caption under `--on-bad`; None fails only the `fatal` problems.

    Raises ImageError, whose kind is the problem, for any other answer.
    """
    problem = answer.problem
    if problem is None or on_bad == "keep" or (on_bad is None and problem not in fatal):
        return answer.text
    shown = " ".join(answer.text.split())
    shown = f"{shown[:_SHOWN]}…" if len(shown) > _SHOWN else shown
    raise ImageError(problem, f"{MESSAGES[problem]}: {shown}" if shown else MESSAGES[problem])


def failing(deliver: Deliver, on_bad: OnBad | None) -> Deliver:
    """`deliver` for a backend whose answers are all kept by default: with `--on-bad fail` bad captions become failures.

    An image with several captions keeps those that are good.
    """

    def judged(index: int, result: Caption | Failure) -> None:
        deliver(index, result if isinstance(result, Failure) else good_captions(result))

    return judged if on_bad == "fail" else deliver


def good_captions(result: Caption) -> Caption | Failure:
    """The result with its good captions, or the failure where it has none."""
    good: list[Candidate] = []
    errors: list[ImageError] = []
    for candidate in result.candidates:
        try:
            accept(judge(candidate.text), "fail")
            good.append(candidate)
        except ImageError as error:
            errors.append(error)
    return replace(result, candidates=tuple(good)) if good else Failure(result.name, errors[0].kind, str(errors[0]))


def without_reasoning(text: str) -> str:
    """The text without blocks such as `<think>...</think>`; one that was not closed extends to the end."""
    return _REASONING_END.sub("", _REASONING.sub("", text)).strip()


def is_refusal(text: str) -> bool:
    """Whether the text begins like a refusal, in one of some languages."""
    return _REFUSALS.match(text[:400].replace("’", "'").replace("，", ",").lower()) is not None  # noqa: RUF001


def is_loop(text: str) -> bool:
    """Whether a passage occurs several times in a row."""
    tokens = _TOKENS.findall(text.lower())
    return any(longest_run(tokens, period) >= _REPEATED_TOKENS for period in range(1, _LONGEST_PERIOD + 1))


def longest_run(tokens: list[str], period: int) -> int:
    """The most tokens in a row that repeat with this period, at least `_REPEATED` times; 0 where none does."""
    longest = run = 0
    for at in range(period, len(tokens)):
        run = run + 1 if tokens[at] == tokens[at - period] else 0
        if run > longest and any(map(str.isalnum, tokens[at - period + 1 : at + 1])):
            longest = run
    return longest + period if longest >= (_REPEATED - 1) * period else 0
