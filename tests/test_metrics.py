"""Scores from Python: pycocoevalcap's figures without Java, the tokenizers, resampling, matching of names."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import pytest

from capcli import interrupts
from capcli.errors import CapcliError
from capcli.metrics import Scorer, java, score_captions
from capcli.metrics.bootstrap import intervals, resample
from capcli.metrics.diversity import diversity
from capcli.metrics.matching import match
from capcli.metrics.tokenization import characters, choose_tokenizer, words

DATA = Path(__file__).parents[2] / "shared" / "data"
ORACLE = DATA / "metrics" / "tylin_fakecap_on_val2017_overlap126.json"
WITHOUT_JAVA = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")
needs_data = pytest.mark.skipif(not ORACLE.exists(), reason="needs ../shared/data")


def needs_java(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test as external, and skip it where there is no Java."""
    return pytest.mark.external(pytest.mark.skipif(shutil.which("java") is None, reason="needs a Java runtime")(test))


REFERENCES = {
    "a.jpg": ["A dog runs.", "The dog is running on grass"],
    "b.jpg": ["Two men ride horses", "A man on a horse"],
    "c.jpg": ["A red car in the street.", "A car parks"],
}


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    return json.loads(ORACLE.read_text())


@needs_data
def test_scores_without_java_equal_the_oracle(oracle: dict[str, Any]) -> None:
    scores = Scorer(oracle["references"]).measure(oracle["candidates"])
    assert scores.corpus == pytest.approx({name: oracle["scores"][name] for name in WITHOUT_JAVA}, abs=2e-6)
    for measure in WITHOUT_JAVA:
        expected = [oracle["per_image"][name][measure] for name in scores.names]
        assert scores.per_image[measure] == pytest.approx(expected, abs=2e-6)


@needs_data
def test_tokens_equal_the_oracle(oracle: dict[str, Any]) -> None:
    assert {name: words(text) for name, text in oracle["candidates"].items()} == oracle["ptb_candidates"]
    found = {name: [words(text) for text in each] for name, each in oracle["references"].items()}
    assert found == oracle["ptb_references"]


@needs_data
@needs_java
def test_tokens_of_every_flickr8k_caption_equal_the_original_tokenizer() -> None:
    with open(DATA / "flickr8k" / "captions.txt", encoding="utf-8", newline="") as file:
        texts = [row["caption"] for row in csv.DictReader(file)]
    assert len(texts) == 35_000
    assert [words(text) for text in texts] == java.tokenize(texts)


@needs_java
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks for the process in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_at_any_line_leaves_no_java(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(java.subprocess, "Popen", Recorded)
    for line in itertools.count():
        Recorded.all.clear()
        interrupted = interrupted_at(line, number)
        assert not any(alive(process.pid) for process in Recorded.all), line
        if not interrupted:
            break
    assert line > 20
    assert Recorded.all  # without an interrupt, Java was started


class Recorded(subprocess.Popen[bytes]):
    """A process that is recorded in `all`."""

    all: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.all.append(self)


def interrupted_at(line: int, number: int) -> bool:
    """Raise a real signal at the line of this number while METEOR starts and ends; False if there are fewer lines."""
    passed = itertools.count()
    traced = {java.__file__, interrupts.__file__}

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename not in traced:
            return None
        if event == "line" and next(passed) == line:
            signal.raise_signal(number)
        return trace

    # The object is collected with the frames that refer to it.
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with interrupts.terminable(), java.Meteor():
            pass
    except (KeyboardInterrupt, SystemExit):
        return True
    finally:
        sys.settrace(before)
    return next(passed) > line


def alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


AWKWARD = [
    "A man's dog doesn't, can't and won't: I'm sure they've seen it.",
    "cannot gonna wanna gimme 'tis the rock 'n' roll o'clock O'Neil ma'am '80s",
    "the \"double\" and 'single' quotes, “smart” \u2018ones\u2019 — it\u2019s; don\u2019t",
    "(brackets) [square] {curly} 50% $5.00 £3 #1 #tag @name a&b AT&T",
    "Mr. Smith of the U.S. at 5 p.m. on St. John St. etc. etc.",
    "black-and-white t-shirt -- 3,000 3.5 1/2 10-year-old 2x4 12:30 1st -- ... ! ?! !!!",
    "No. 5 and no. and the letter A. The end of plan b",
    "a|b a||| b ||| c <unk> <b>bold</b> < 3 &amp; http://x.com/a?b=c me@x.com",
    "café naïve Straße ÉCOLE 日本 Москва a_b a/b c++ ★ m² 5° é",
    "dog 🐶 and\u200bzero \ufeff width \xad soft\xadhyphen \x00 nul",
    "",
    "   ",
    "?!",
    "line\nbreak\rand\u2028more\x85of\x0bthem\ttab",
    "word " * 10_000,
]


@needs_java
def test_tokens_of_awkward_captions_equal_the_original_tokenizer() -> None:
    assert [words(text) for text in AWKWARD] == java.tokenize(AWKWARD)


@needs_java
@pytest.mark.parametrize("variable", ["JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS"])
def test_meteor_is_the_same_where_numbers_have_a_decimal_comma(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def score() -> tuple[list[float], list[float]]:
        with java.Meteor() as meteor:
            counts = meteor.statistics("a dog runs on the grass", ["a dog is running"])
            return counts, meteor.scores([counts])

    here = score()
    german = "-Duser.language=de -Duser.country=DE -Duser.language.format=de -Duser.country.format=DE"
    monkeypatch.setenv(variable, german)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert score() == here
    assert 0 < here[1][0] < 1


def test_characters_are_compared_where_a_script_has_no_spaces() -> None:
    assert characters("一个人\uff0c在跑。") == "一 个 人 在 跑"
    assert characters("スマホを持つ２人 iPhone 12!") == "ス マ ホ を 持 つ 2 人 iphone 12"
    assert characters("ผู้ชาย") == "ผู้ ช า ย"
    assert choose_tokenizer(["一个人在跑", "a 狗"]) == "characters"
    assert choose_tokenizer(["two dogs", "犬"]) == "ptb"
    assert choose_tokenizer(["한국어 단어", "두 마리"]) == "ptb"
    references = {"1": ["一个人在跑步"], "2": ["两只狗在草地上"]}
    assert 0 < score_captions({"1": "一个人跑", "2": "一只狗在草地"}, references)["Bleu_1"] < 1
    assert Scorer(references, "ptb").score({"1": "一个人跑", "2": "狗"})["Bleu_1"] == pytest.approx(0, abs=1e-6)


def test_a_scorer_is_reusable_and_scores_images_with_caption_and_reference() -> None:
    scorer = Scorer(REFERENCES | {"without.jpg": []})
    perfect = {name: texts[0] for name, texts in REFERENCES.items()}
    assert scorer.score(perfect)["Bleu_4"] > scorer.score(perfect | {"b.jpg": "a cat"})["Bleu_4"]
    some = {name: perfect[name] for name in ("a.jpg", "b.jpg")}
    alone = score_captions(some, {name: REFERENCES[name] for name in some})
    assert scorer.score(some | {"unknown.jpg": "a dog", "without.jpg": "a dog"}) == alone
    assert list(alone) == list(WITHOUT_JAVA)
    with pytest.raises(CapcliError, match="no captioned image has references"):
        scorer.score({"unknown.jpg": "a dog"})


def test_captions_without_words_score_zero() -> None:
    scores = Scorer(REFERENCES).measure({"a.jpg": "", "b.jpg": "?!...", "c.jpg": "a car parks"})
    for measure in WITHOUT_JAVA:
        assert scores.per_image[measure][:2] == pytest.approx(0, abs=1e-6)
    assert scores.per_image["Bleu_3"][2] == pytest.approx(1, abs=1e-6)
    assert score_captions(dict.fromkeys(REFERENCES, ""), REFERENCES) == pytest.approx(
        dict.fromkeys(WITHOUT_JAVA, 0), abs=1e-9
    )


def random_captions(images: int, seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions and references of random words; half of the captions equal a reference."""
    random = np.random.default_rng(seed)
    references = {f"{n}.jpg": [" ".join(random.choice(list("abcdefgh"), 6)) for _ in range(2)] for n in range(images)}
    wrong = {name: " ".join(random.choice(list("defgz"), random.integers(2, 8))) for name in references}
    captions = {name: texts[0] if random.random() < 0.5 else wrong[name] for name, texts in references.items()}
    return captions, references


def test_resampling_scores_the_corpus_again() -> None:
    captions, references = random_captions(12, 3)
    scores = Scorer(references).measure(captions)
    drawn = resample([scores], None, 5, seed=9)[0]
    random = np.random.default_rng(9)
    for number in range(5):  # the same draws, scored by pycocoevalcap as a corpus
        chosen = [scores.names[index] for index in random.integers(12, size=12)]
        copies = {f"{place} {name}": name for place, name in enumerate(chosen)}
        again = Scorer({copy: references[name] for copy, name in copies.items()}).score(
            {copy: captions[name] for copy, name in copies.items()}
        )
        for measure in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"):
            assert drawn[measure][number] == pytest.approx(again[measure])
        cider = np.mean([scores.per_image["CIDEr"][scores.names.index(name)] for name in chosen])
        assert drawn["CIDEr"][number] == pytest.approx(cider)  # its document frequencies do not change


def test_intervals_equal_those_of_the_known_distribution() -> None:
    images = 400
    references = {f"{n}.jpg": ["one two three", "other words here"] for n in range(images)}
    captions = {name: "one two three" if n % 4 else "zzz" for n, name in enumerate(references)}  # ROUGE-L is 1 or 0
    scores = Scorer(references).measure(captions)
    low, high = intervals(resample([scores], None, 4000, seed=1)[0])["ROUGE_L"]
    deviation = (0.75 * 0.25 / images) ** 0.5
    assert (low, high) == pytest.approx((0.75 - 1.96 * deviation, 0.75 + 1.96 * deviation), abs=0.005)


def test_draws_depend_on_the_seed_and_are_shared() -> None:
    captions, references = random_captions(30, 5)
    other = {name: f"{text[:-1]}z" for name, text in captions.items()}  # the last word is wrong
    scorer = Scorer(references)
    both = [scorer.measure(captions), scorer.measure(other)]
    first, second = resample(both, None, 50, seed=4)
    again = resample(both[::-1], None, 50, seed=4)[1]
    assert all((first[measure] == again[measure]).all() for measure in first)
    assert (first["Bleu_1"] > second["Bleu_1"]).all()  # true of every draw only where the draws are the same
    assert (resample(both, None, 50, seed=5)[0]["CIDEr"] != first["CIDEr"]).any()


def test_diversity_counts_lengths_and_repetitions() -> None:
    figures = diversity(["a dog and a dog", "a dog", "a dog", "b"])
    assert figures["words_mean"] == 10 / 4
    assert (figures["words_min"], figures["words_max"]) == (1, 5)
    assert (figures["distinct_captions"], figures["distinct_share"]) == (3, 0.75)
    assert (figures["repeated_2"], figures["repeated_3"]) == (0.25, 0)
    assert (figures["distinct_1"], figures["distinct_2"]) == (4 / 10, 3 / 6)
    assert diversity([""])["distinct_2"] == 0


@pytest.mark.parametrize(
    ("captioned", "referenced", "expected"),
    [
        (["val/1.jpg"], ["1.jpg"], {"val/1.jpg": "1.jpg"}),
        (["./a.jpg", "b\\c.jpg"], ["a.jpg", "b/c.jpg"], {"./a.jpg": "a.jpg", "b\\c.jpg": "b/c.jpg"}),
        (["x/1.jpg", "y/1.jpg"], ["1.jpg"], {}),
        (["1.jpg"], ["x/1.jpg", "y/1.jpg"], {}),
        (["x/1.jpg", "1.jpg"], ["1.jpg", "z/1.jpg"], {"1.jpg": "1.jpg", "x/1.jpg": "z/1.jpg"}),
        (["a.webp"], ["photos/a.jpg"], {"a.webp": "photos/a.jpg"}),
        (["391895"], ["COCO_val2014_000000391895.jpg"], {"391895": "COCO_val2014_000000391895.jpg"}),
        (["000000391895.jpg"], ["391895"], {"000000391895.jpg": "391895"}),
        (["cafe\u0301.jpg"], ["caf\xe9.jpg"], {"cafe\u0301.jpg": "caf\xe9.jpg"}),
        (["\udcff.jpg"], ["a/\udcff.jpg"], {"\udcff.jpg": "a/\udcff.jpg"}),
        (["photo-12.jpg"], ["12"], {}),
    ],
)
def test_names_match_where_they_are_unambiguous(
    captioned: list[str], referenced: list[str], expected: dict[str, str]
) -> None:
    assert match(captioned, referenced) == expected
