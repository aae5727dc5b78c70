"""Responses of chat completions: their texts, scores and token counts, and the messages of errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capcli.captioning.answers import REASONING_ENDS
from capcli.errors import ImageError
from capcli.text import printable

_SHOWN = 300  # characters of a server's error in a message


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. `refused` means that the server states a refusal; `score` is None without log-probabilities."""

    text: str
    cut: bool
    refused: bool
    score: float | None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answers to one request; the token counts are None where the server does not report them."""

    choices: tuple[Choice, ...]
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def parse_completion(content: bytes) -> Completion:
    """The completion in the body of a response. Raises ImageError, `malformed-answer`, for anything else."""
    try:
        body = json.loads(content)
        choices = tuple(parse_choice(choice) for choice in body["choices"])
        usage = body.get("usage") or {}
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        raise malformed(content) from None
    if not choices:
        raise malformed(content)
    prompt, completion = (n if isinstance(n, int) and n >= 0 else None for n in counts)
    return Completion(choices, prompt, completion)


def malformed(content: bytes) -> ImageError:
    shown = printable(" ".join(content[:_SHOWN].decode("utf-8", "replace").split()))[:100] or "nothing"
    return ImageError("malformed-answer", f"the response is not a chat completion: {shown}")


def parse_choice(choice: Mapping[str, Any]) -> Choice:
    """One item of `choices`. Raises TypeError, LookupError or AttributeError for one of another structure."""
    message, reason = choice["message"], choice.get("finish_reason")
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, list):  # parts
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError
    refused = bool(refusal) or reason == "content_filter"
    text = content or (refusal if isinstance(refusal, str) else "")
    return Choice(text, cut=reason == "length", refused=refused, score=mean_logprob(choice.get("logprobs")))


def mean_logprob(logprobs: object) -> float | None:
    """The mean log-probability of the tokens after a reasoning block; None where the server gives none."""
    tokens = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(tokens, list) or not tokens:
        return None
    values: list[float] = []
    written = ""
    for token in tokens:
        value = token.get("logprob") if isinstance(token, Mapping) else None
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        values.append(value)
        written = written[-20:] + str(token.get("token", ""))
        if written.rstrip().endswith(REASONING_ENDS):
            values = []
    return sum(values) / len(values) if values else None


def error_text(content: bytes) -> str:
    """The message in the body of an error, on one line; empty where there is none."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return shown_text(content.decode("utf-8", "replace"))
    for key in ("error", "detail", "message"):
        found = body.get(key) if isinstance(body, Mapping) else None
        if isinstance(found, Mapping):
            found = found.get("message") or found
        if found:
            return shown_text(found if isinstance(found, str) else json.dumps(found))
    return shown_text(content.decode("utf-8", "replace"))


def error_code(content: bytes) -> str:
    """The code in the body of an error, such as `model_not_found`; empty where there is none."""
    try:
        error = json.loads(content)["error"]
        return f"{error.get('code') or ''} {error.get('type') or ''}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def shown_text(text: str) -> str:
    return printable(" ".join(text.split()))[:_SHOWN]
