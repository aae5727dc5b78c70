"""Search: every field of a generation_config is supported, without effect, or refused; and the shortcuts of beam search."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from captioners import captions, pictures, random_captioner
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from oracle import Case, agrees
from transformers import GenerationConfig

from capcli.decoding.search import top_few
from capcli.decoding.settings import NEUTRAL, SUPPORTED, WITHOUT_EFFECT, Settings, idle, resolve
from capcli.decoding.topk import BLOCK, best_of_blocks
from capcli.errors import CapcliError, UsageError
from capcli.options import GenerationOptions

START = {"decoder_start_token_id": 1}


def settings_of(checkpoint=(), prompt=(), **options) -> Settings:
    return resolve({**START, **dict(checkpoint)}, GenerationOptions(**options), prompt)


# Every field of transformers' GenerationConfig is on one of four lists. A new field in transformers fails here until somebody
# decides whether to support it, to list it as without effect, or to refuse it.
REFUSED = {
    "max_time": 3.0,
    "stop_strings": ["."],
    "top_h": 0.4,
    "exponential_decay_length_penalty": (3, 1.2),
    "sequence_bias": [[[3], 1.0]],
    "watermarking_config": {"bias": 2.0},
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "speculation_type": "x",
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "constraints": ["x"],
    "force_words_ids": [[3]],
    # neutral at transformers' own default, refused elsewhere
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "guidance_scale": 2.0,
    "token_healing": True,
    "use_mtp": True,
}


def test_every_field_of_a_generation_config_is_on_a_list():
    fields = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert fields <= SUPPORTED | WITHOUT_EFFECT | set(REFUSED), (
        "transformers has new fields: decide what to do with them"
    )


def test_no_field_is_on_two_lists():
    assert not SUPPORTED & WITHOUT_EFFECT
    assert not set(REFUSED) & (SUPPORTED | WITHOUT_EFFECT)
    assert set(NEUTRAL) <= set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_would_change_captions_is_refused_by_name(name):
    with pytest.raises(CapcliError, match=f"{name}="):
        settings_of({name: REFUSED[name]})
    assert settings_of({name: None}) == settings_of()


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(CapcliError, match="louder=True"):
        settings_of({"louder": True})


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_field_at_its_neutral_value_changes_nothing(name):
    for value in NEUTRAL[name]:
        assert settings_of({name: value}) == settings_of()


def test_fields_without_effect_change_nothing():
    assert settings_of(dict.fromkeys(WITHOUT_EFFECT, 1)) == settings_of()


def test_missing_fields_have_the_defaults_of_generate():
    defaults = GenerationConfig._get_default_generation_params()  # noqa: SLF001
    found = settings_of()
    assert found.max_new_tokens == defaults["max_length"]
    for name in Settings.__dataclass_fields__:
        if name in defaults and defaults[name] is not None:
            assert getattr(found, name) == defaults[name], name
    for name in defaults.keys() & NEUTRAL.keys():
        assert defaults[name] in NEUTRAL[name]


def test_options_come_before_the_checkpoint():
    checkpoint = {"num_beams": 3, "max_length": 9, "length_penalty": 2.0, "num_return_sequences": 2}
    found = settings_of(checkpoint, num_beams=5)
    assert (found.num_beams, found.num_return_sequences, found.length_penalty, found.max_new_tokens) == (5, 2, 2.0, 8)


def test_the_start_token_is_put_before_a_prompt_that_lacks_it():
    assert settings_of(prompt=(4, 5)).prompt == (1, 4, 5)
    assert settings_of(prompt=(1, 5)).prompt == (1, 5)
    assert resolve({"bos_token_id": 7}, GenerationOptions()).prompt == (7,)
    with pytest.raises(CapcliError, match="decoder_start_token_id"):
        resolve({}, GenerationOptions())


def test_rows_and_pool_entries_follow_from_the_settings():
    beams = settings_of(num_beams=4, num_return_sequences=2, max_new_tokens=10, prompt=(4, 5))
    assert (beams.rows, beams.entries) == (4, 2 + 4 * 10)
    samples = settings_of(do_sample=True, num_return_sequences=3, max_new_tokens=10)
    assert (samples.rows, samples.entries) == (3, 30)


@pytest.mark.parametrize("options", [{"num_return_sequences": 2}, {"num_beams": 2, "num_return_sequences": 3}])
def test_more_captions_than_the_search_has_are_refused(options):
    with pytest.raises(UsageError, match="--num-beams"):
        settings_of(**options)


def test_the_run_file_names_the_settings_that_have_an_effect():
    """Its names never change: a run of an earlier version must resume."""
    shown = settings_of(num_beams=2).in_run_file()
    assert shown["num_beams"] == 2
    assert {"length_penalty", "early_stopping"} <= shown.keys()
    assert not {"temperature", "seed", "encoder_ids", "question"} & shown.keys()
    assert replace(settings_of(), encoder_ids=(3, 4)).in_run_file()["question"] == [3, 4]


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(UsageError, match="3 tokens and the checkpoint allows 3"):
        settings_of({"max_length": 3}, prompt=(4, 5))


def test_settings_without_effect_give_a_warning():
    options = GenerationOptions(top_k=5, length_penalty=2.0)
    assert len(idle(options, settings_of(top_k=5, length_penalty=2.0))) == 2
    assert idle(options, settings_of(do_sample=True, num_beams=2)) == []


@hypothesis(max_examples=200, deadline=None)
@given(
    st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK - 1, 5 * BLOCK + 1, 12 * BLOCK + 17]),
    st.integers(1, 8),
    st.integers(0, 2**32),
)
def test_top_few_equals_topk(size, k, seed):
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(seed))
    k = min(k, size)
    values, indices = top_few(x, k, best_of_blocks(x))
    expected = x.topk(k)
    assert torch.equal(values, expected.values)
    assert torch.equal(x.gather(-1, indices), values)
    assert len(x.unique()) < x.numel() or torch.equal(indices, expected.indices)


def test_top_few_finds_values_in_one_block_at_its_ends_and_in_the_rest():
    x = torch.zeros(1, 1, 5 * BLOCK + 9)
    x[..., BLOCK - 1], x[..., 3 * BLOCK : 3 * BLOCK + 2], x[..., -1] = 3.0, torch.tensor([5.0, 4.0]), 9.0
    assert top_few(x, 4, best_of_blocks(x))[1].tolist() == [[[5 * BLOCK + 8, 3 * BLOCK, 3 * BLOCK + 1, BLOCK - 1]]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_new_tokens": 5, "no_repeat_ngram_size": 1},
        {"repetition_penalty": 1.5},
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "min_new_tokens": 5, "no_repeat_ngram_size": 1},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    ],
)
def test_a_large_vocabulary_equals_generate(options):
    model = random_captioner("vit", "gpt2", vocabulary=23_003, width=16, dtype=torch.float64)
    agrees(model, pictures(5), Case({"max_new_tokens": 8, **options}))


def test_sampled_beams_draw_from_a_large_vocabulary_without_a_filter():
    model = random_captioner("vit", "gpt2", vocabulary=23_003, width=16, dtype=torch.float64)
    settings = Case({"num_beams": 3, "do_sample": True, "top_k": 0, "max_new_tokens": 6}).settings(model)
    found = {h[0].tokens for h in captions(model, pictures(1) * 6, settings, keys=list(range(6)))}
    assert len(found) > 1


@pytest.mark.parametrize("options", [{"num_beams": 4, "num_return_sequences": 4}, {"num_return_sequences": 3}])
def test_sampling_from_fewer_tokens_than_rows_gives_captions(options):
    """generate() itself cannot draw here."""
    model = random_captioner("vit", "gpt2", seed=1)
    case = Case({"do_sample": True, "top_k": 1, "max_new_tokens": 8, **options})
    for hypotheses in captions(model, pictures(3), case.settings(model)):
        assert len(hypotheses) == options["num_return_sequences"]
        assert all(h.tokens and h.score > -50 for h in hypotheses)
