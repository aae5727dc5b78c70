"""Tokenizers for training: special tokens of every kind of vocabulary, SentencePiece token for token, captions to labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from assembling import CAPTIONS, RINNA, save_bytes, save_characters, save_pieces, write_json
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from capcli.errors import CapcliError, UsageError
from capcli.training.model.tokenizers import (
    SpecialTokens,
    encode_captions,
    load_tokenizer,
    new_tokenizer,
    special_tokens,
)

ODD = [
    "",
    "   two  spaces and\tothers\u3000here ",
    "\uff21 wide, ①, ㍿ and ｶﾞｯﾂ",
    "e\u0301 composed, か\u3099 too",
    "a 狗 nobody 見た",
    "▁ and ▁▁ themselves",
    "👨‍👩‍👧 a family",
]

CASED = ["ABCDEFGHIJKLMNOPQRSTUVWXYZ", *CAPTIONS]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_gpt2_has_one_token_for_start_end_and_padding(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_bytes(tmp_path)))
    specials = special_tokens(tokenizer)
    assert specials == SpecialTokens(0, 0, 0)
    assert specials.line(tokenizer) == (
        "special tokens: start <|endoftext|> (0), end <|endoftext|> (0), pad <|endoftext|> (0)"
    )


def test_bert_vocabularies_start_with_cls_and_end_with_sep(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_characters(tmp_path)))
    specials = special_tokens(tokenizer)
    assert specials.line(tokenizer) == "special tokens: start [CLS] (2), end [SEP] (3), pad [PAD] (0)"


def test_sentencepiece_models_name_their_special_tokens(tmp_path: Path) -> None:
    save_pieces(tmp_path / "padded", control_symbols=["[PAD]", "[CLS]"])
    tokenizer = load_tokenizer(str(tmp_path / "padded"))
    assert special_tokens(tokenizer).line(tokenizer) == "special tokens: start <s> (1), end </s> (2), pad [PAD] (3)"
    save_pieces(tmp_path / "bare", bos_id=-1)
    bare = load_tokenizer(str(tmp_path / "bare"))
    assert special_tokens(bare).line(bare) == "special tokens: start </s> (2), end </s> (2), pad </s> (2)"


def test_special_tokens_of_a_config_count_only_if_the_tokenizer_has_them() -> None:
    class Config:
        bos_token_id = eos_token_id = 50256

    core = Tokenizer(models.WordLevel({"a": 0, "dog": 1, "[unk]": 2, "end": 3}, unk_token="[unk]"))
    nameless = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[unk]")
    with pytest.raises(CapcliError, match=r"no end token \(neither eos_token nor sep_token\).*tokenizer_config\.json"):
        special_tokens(nameless, Config)
    Config.eos_token_id = 3
    assert special_tokens(nameless, Config) == SpecialTokens(3, 3, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model_type": "bpe"},
        {"byte_fallback": True, "vocab_size": 400},
        {"model_type": "bpe", "byte_fallback": True, "vocab_size": 400},
        {"normalization_rule_name": "identity"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": False},
        {"user_defined_symbols": ["dog"]},
    ],
    ids=str,
)
def test_tokens_equal_those_of_sentencepiece(tmp_path: Path, settings: dict[str, Any]) -> None:
    pieces = save_pieces(tmp_path, captions=CASED, **settings)
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == pieces.get_piece_size()  # without T5's sentinel tokens
    for text in [*CAPTIONS, *ODD]:
        assert token_ids(tokenizer, text) == pieces.encode(text), text
    for text in CAPTIONS:
        assert tokenizer.decode(pieces.encode(text)) == pieces.decode(pieces.encode(text))


@pytest.mark.skipif(not RINNA.exists(), reason="the shared data is not here")
def test_rinnas_tokens_equal_those_of_sentencepiece() -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(RINNA / "spiece.model"))
    tokenizer = load_tokenizer(str(RINNA))
    assert special_tokens(tokenizer).line(tokenizer) == "special tokens: start <s> (1), end </s> (2), pad [PAD] (3)"
    assert len(tokenizer) == 32000
    japanese = [
        "犬がボールで遊んでいる。",
        "ｔシャツを着た男性が、　サーフィンを している",
        "ﾊﾞﾅﾅとﾊﾟﾝ \uff11\uff12",
        "𠮷野家の前",
    ]
    for text in [*japanese, *CAPTIONS, *ODD]:
        assert token_ids(tokenizer, text) == pieces.encode(text.lower()), text
    assert token_ids(tokenizer, "Tシャツ") == pieces.encode("tシャツ")  # T is in no piece: it would be unknown
    labels = encode_captions(tokenizer, japanese, special_tokens(tokenizer), 50)
    assert [row[-1] for row in labels] == [2] * 4
    assert tokenizer.decode(labels[0], skip_special_tokens=True) == japanese[0]


def test_a_saved_sentencepiece_tokenizer_does_not_need_the_model_file(tmp_path: Path) -> None:
    pieces = save_pieces(tmp_path / "from", control_symbols=["[PAD]"])
    write_json(tmp_path / "from" / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "pad_token": "[PAD]"})
    load_tokenizer(str(tmp_path / "from")).save_pretrained(tmp_path / "to")
    assert not list((tmp_path / "to").glob("*.model"))
    again: Any = AutoTokenizer.from_pretrained(tmp_path / "to")
    assert special_tokens(again) == SpecialTokens(1, 2, 3)
    assert [token_ids(again, text) for text in CAPTIONS] == [pieces.encode(text) for text in CAPTIONS]


def test_text_is_lower_cased_where_the_tokenizer_config_says_so(tmp_path: Path) -> None:
    pieces = save_pieces(tmp_path, captions=CASED)
    assert token_ids(load_tokenizer(str(tmp_path)), "A Black DOG") == pieces.encode("A Black DOG")
    write_json(tmp_path / "tokenizer_config.json", {"do_lower_case": True})
    assert token_ids(load_tokenizer(str(tmp_path)), "A Black DOG") == pieces.encode("a black dog")


def test_text_is_lower_cased_where_the_model_has_no_capitals(tmp_path: Path) -> None:
    pieces = save_pieces(tmp_path, captions=["the quick brown fox jumps over the lazy dogs", *CAPTIONS])
    assert token_ids(load_tokenizer(str(tmp_path)), "A Black DOG") == pieces.encode("a black dog")


def test_a_new_tokenizer_encodes_any_text(tmp_path: Path) -> None:
    tokenizer = new_tokenizer(CAPTIONS, 420)
    assert len(tokenizer) <= 420
    specials = special_tokens(tokenizer)
    assert specials.line(tokenizer) == "special tokens: start <s> (0), end </s> (1), pad <pad> (2)"
    unseen = ["Zürich 🇨🇭 is naïve", "雪だるま", "<s> </s>", "ﷺ"]
    labels = encode_captions(tokenizer, [*CAPTIONS, *unseen], specials, 500)
    assert tokenizer.batch_decode(labels, skip_special_tokens=True) == [*CAPTIONS, *unseen]
    assert all(
        len(row) < len(text) / 2 for row, text in zip(labels[:8], CAPTIONS, strict=False)
    )  # it has learned words
    tokenizer.save_pretrained(tmp_path)
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_captions(again, CAPTIONS, special_tokens(again), 50) == labels[: len(CAPTIONS)]


def test_a_word_is_the_same_token_at_every_position() -> None:
    tokenizer = new_tokenizer(["dog dog dog", "a dog"] * 5, 320)
    assert len(set(token_ids(tokenizer, "dog dog dog"))) == 1


def test_the_same_captions_give_the_same_tokenizer() -> None:
    first, second = (new_tokenizer(iter(CAPTIONS), 350).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_new_tokenizer_needs_captions() -> None:
    with pytest.raises(CapcliError, match="no captions"):
        new_tokenizer([], 300)


def test_labels_end_with_the_end_token_even_if_it_is_also_padding(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_bytes(tmp_path)))
    specials = special_tokens(tokenizer)
    labels = encode_captions(tokenizer, CAPTIONS, specials, 50)
    assert [row.count(specials.end) for row in labels] == [1] * len(CAPTIONS)
    assert [row[-1] for row in labels] == [specials.end] * len(CAPTIONS)
    assert [tokenizer.decode(row[:-1]) for row in labels] == CAPTIONS


def test_a_truncated_caption_has_no_end_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_characters(tmp_path)))
    specials = special_tokens(tokenizer)
    (whole,) = encode_captions(tokenizer, ["一个男孩在公园里踢球"], specials, 11)
    assert len(whole) == 11
    assert whole[-1] == specials.end
    (cut,) = encode_captions(tokenizer, ["一个男孩在公园里踢球"], specials, 10)
    assert cut == whole[:10]


@pytest.mark.parametrize("kind", [save_bytes, save_characters, save_pieces])
def test_text_that_looks_like_a_special_token_is_encoded_as_text(tmp_path: Path, kind: Any) -> None:
    kind(tmp_path)
    tokenizer: Any = load_tokenizer(str(tmp_path))
    specials = special_tokens(tokenizer)
    text = " ".join(["a dog", *tokenizer.all_special_tokens, "runs"])
    (labels,) = encode_captions(tokenizer, [text], specials, 200)
    assert labels[-1] == specials.end
    assert not {specials.start, specials.end, specials.pad} & set(labels[:-1])


def test_more_captions_than_one_batch_keep_their_order(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_bytes(tmp_path)))
    specials = special_tokens(tokenizer)
    many = [f"dog {number}" for number in range(5000)]
    labels = encode_captions(tokenizer, many, specials, 50)
    assert [tokenizer.decode(labels[i][:-1]) for i in (0, 4095, 4096, 4999)] == [
        "dog 0",
        "dog 4095",
        "dog 4096",
        "dog 4999",
    ]


def test_tokenizer_json_is_preferred_to_a_model_file(tmp_path: Path) -> None:
    new_tokenizer(CAPTIONS, 300).save_pretrained(tmp_path)
    save_pieces(tmp_path)
    assert load_tokenizer(str(tmp_path)).convert_ids_to_tokens(2) == "<pad>"


def test_unusable_tokenizers_are_refused_with_the_reason(tmp_path: Path) -> None:
    empty = tmp_path / "empty folder"
    empty.mkdir()
    with pytest.raises(CapcliError, match=r"empty folder has no tokenizer: tokenizer\.json, .*vocab\.txt"):
        load_tokenizer(str(empty))
    with pytest.raises(UsageError, match=r"No such folder: .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (empty / "spiece.model").write_bytes(b"no such thing")
    with pytest.raises(CapcliError, match=r"spiece\.model is not a SentencePiece model"):
        load_tokenizer(str(empty))
    with pytest.raises(UsageError, match=r"--tokenizer takes the folder"):
        load_tokenizer(str(empty / "spiece.model"))
    save_pieces(empty)
    whole = (empty / "spiece.model").read_bytes()
    (empty / "other.model").write_bytes(whole)
    with pytest.raises(CapcliError, match=r"several SentencePiece models \(other\.model, spiece\.model\)"):
        load_tokenizer(str(empty))
    (empty / "other.model").unlink()
    (empty / "spiece.model").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CapcliError, match=r"spiece\.model"):
        load_tokenizer(str(empty))


def test_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    save_characters(tmp_path)
    custom = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(custom))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(CapcliError, match="runs no code of a model"):
        load_tokenizer(str(tmp_path))
