"""On a CUDA device: the same captions as `generate()` there, through refill and flags that are read late."""

from __future__ import annotations

import pytest
import torch
from captioners import SIZE, random_captioner

from capcli.decoding.loop import IterableFeed, Job, Shapes, decode
from capcli.decoding.settings import resolve
from capcli.models.vision_encoder_decoder import Encode, Step
from capcli.options import GenerationOptions
from capcli.runtimes.eager import Eager

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("given", [{}, {"num_beams": 4, "no_repeat_ngram_size": 2}], ids=["greedy", "beams"])
def test_captions_on_a_gpu_equal_generate_there(given: dict[str, int]) -> None:
    device = torch.device("cuda:0")
    model = random_captioner("vit", "gpt2", seed=3).double().to(device)
    settings = resolve(model.generation_config.to_dict(), GenerationOptions(max_new_tokens=12, **given))
    images = torch.randint(0, 256, (9, SIZE, SIZE, 3), dtype=torch.uint8).numpy()
    runtime = Eager(Encode(model, 1 / 255, (0.5,) * 3, (0.5,) * 3).eval().to(device), Step(model).eval(), device)
    jobs = [Job(index, image) for index, image in enumerate(images)]
    found = {d.tag: d.hypotheses[0].tokens for d in decode(IterableFeed(jobs), runtime, settings, Shapes(4, 2))}
    for index, image in enumerate(images):
        values = ((torch.from_numpy(image).double() * (1 / 255)).float() - 0.5) / 0.5
        values = values.permute(2, 0, 1)[None].double().to(device)
        said = model.generate(pixel_values=values, max_new_tokens=12, **given)[0, 1:].tolist()
        assert list(found[index]) == said[: len(found[index])]
        assert len(said) == len(found[index])
