"""The rules for answers that are no captions."""

from __future__ import annotations

import pytest

from capcli.captioning.answers import failing, judge
from capcli.records import Candidate, Caption, Failure


@pytest.mark.parametrize(
    ("text", "answer", "problem"),
    [
        ("A dog runs.", "A dog runs.", None),
        (" A dog.\n\nIt runs. ", "A dog.\n\nIt runs.", None),
        ("<think>Is it a dog?</think>\n\nA dog.", "A dog.", None),
        ("Is it a dog?</think>A dog.", "A dog.", None),
        ("<think>Is it", "", "empty-answer"),
        (" \n", "", "empty-answer"),
        ("A dog.<|im_end|>", "A dog.", "special-token"),
        ("<s> A dog.</s>", "A dog.", "special-token"),
        ("A dog<end_of_turn>\n", "A dog", "special-token"),
        ("I'm sorry, but I can't help with that.", None, "refusal"),
        ("I’m unable to identify people in images.", None, "refusal"),  # noqa: RUF001
        ("Unfortunately, I cannot describe this image.", None, "refusal"),
        ("As an AI language model, I do not see images.", None, "refusal"),
        ("抱歉，我无法描述这张图片。", None, "refusal"),  # noqa: RUF001
        ("A sign that says: I'm sorry, I can't help you.", None, None),
        ("I can see a dog that cannot swim.", None, None),
        ("a dog and " * 9, None, "loop"),
        ("The image shows a dog. " * 3, None, "loop"),
        ("一只狗" * 8, None, "loop"),
        ("a very, very, very happy dog", None, None),
        ("red car, blue car, red car, blue car", None, None),
        ("A table.\n--------------------\n| a | b |", None, None),
    ],
)
def test_an_answer_is_judged_by_its_text(text: str, answer: str | None, problem: str | None) -> None:
    found = judge(text)
    assert found.problem == problem
    assert found.text == (text.strip() if answer is None else answer)


def test_a_cut_answer_is_cut_whatever_it_contains() -> None:
    assert judge("a dog and " * 9, cut=True).problem == judge("", cut=True).problem == "cut-answer"


def test_a_backend_that_keeps_all_answers_fails_bad_ones_on_request() -> None:
    found: list[Caption | Failure] = []
    good, loop = Candidate("a dog", -1.0), Candidate("a dog and " * 9, -0.5)
    for result in (Caption("a", (loop, good)), Caption("b", (loop,)), Failure("c", "missing", "")):
        failing(lambda _, result: found.append(result), "fail")(0, result)
    assert found[0] == Caption("a", (good,))
    assert [failure.error for failure in found[1:] if isinstance(failure, Failure)] == ["loop", "missing"]
