"""A step can be recorded and replayed: no operation waits for the device, and all tensors keep their addresses.

A CUDA graph requires that (test_gpu.py captures one). Here the step runs on the meta device, which computes nothing, and a
recording of its operations is replayed in its place.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captioners import HALF, modules, pictures, random_captioner
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capcli.decoding.activity import Activity
from capcli.decoding.loop import Batch, IterableFeed, Job, decode
from capcli.decoding.settings import Settings, resolve
from capcli.decoding.shapes import Shapes
from capcli.models.attention import use_attention
from capcli.models.vision_encoder_decoder import Encode, Step
from capcli.options import GenerationOptions
from capcli.runtimes.eager import WARM_UPS, Eager

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "4 beams": {"num_beams": 4},
    "bans": {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "bans, 3 beams": {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "constraints": {
        "num_beams": 3,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "min_new_tokens": 3,
        "length_penalty": 2.0,
    },
    "sampling": {"do_sample": True, "num_return_sequences": 3, "top_k": 9, "top_p": 0.9, "temperature": 1.4},
    "sampled beams": {"do_sample": True, "num_beams": 5, "num_return_sequences": 5, "seed": 3},
}
every_search = pytest.mark.parametrize("given", SEARCHES.values(), ids=SEARCHES.keys())
families = pytest.mark.parametrize("decoder", ["gpt2", "bert"])


class Watch(TorchDispatchMode):
    """Collects the operations that wait for the device or copy a tensor from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        # a scalar on the host may be an operand of a kernel without a copy to the device
        host = [x for x in inputs if x.device.type == "cpu" and x.dim()]
        crossing = {x.device.type for x in (*inputs, *outputs) if x.dim() or "copy" in str(func)} == {"cpu", "meta"}
        waits = any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique"))
        if host or crossing or waits:
            self.bad.append(str(func))
        return result


@every_search
@families
def test_no_operation_of_a_step_waits_for_the_device(decoder: str, given: dict[str, Any]) -> None:
    model = copy.deepcopy(random_captioner("vit", decoder)).to("meta")
    use_attention(model.decoder)
    settings = resolve(model.generation_config.to_dict(), GenerationOptions(max_new_tokens=8, **given))
    encode, step = Encode(model, 1 / 255, HALF, HALF).eval().to("meta"), Step(model).eval()
    runtime = Eager(encode, step, torch.device("meta"))
    jobs = [Job(n, picture) for n, picture in enumerate(pictures(4))]
    runtime.allocate(Shapes(4, 2), settings)
    batch = Batch(
        IterableFeed(jobs), runtime, settings, Shapes(4, 2), deque(), Activity().loop(settings.max_new_tokens)
    )
    with torch.inference_mode():
        batch.fetch(wait=0)
        batch.fill()
        with Watch() as watch:
            batch.decode_token()
    assert not watch.bad


class Replaying(Eager):
    """Replays the recorded operations of the third step with the same tensors."""

    replayed = 0

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        done, recording = 0, None

        def again() -> None:
            nonlocal done, recording
            done += 1
            if done <= WARM_UPS:
                step()
                return
            if recording is None:
                before = [x.clone() for x in state]
                recording = make_fx(lambda: step())()
                for x, old in zip(state, before, strict=True):
                    x.copy_(old)  # unlike a CUDA graph's capture, this recording executed the step
            recording()
            self.replayed += 1

        batch = step.__self__  # type: ignore[attr-defined]
        state = [x for x in vars(batch.search).values() if isinstance(x, torch.Tensor)]
        return again


@every_search
@families
def test_a_recorded_step_gives_the_same_captions(decoder: str, given: dict[str, Any]) -> None:
    model = random_captioner("vit", decoder, seed=5)
    settings = resolve(model.generation_config.to_dict(), GenerationOptions(max_new_tokens=12, **given))
    runtime = Replaying(*modules(model), torch.device("cpu"))
    images = pictures(11, seed=4)
    plain = Eager(*modules(model), torch.device("cpu"))
    assert tokens(runtime, images, settings) == tokens(plain, images, settings)
    assert runtime.replayed > len(images) // 4


def tokens(runtime: Eager, images: list[Any], settings: Settings) -> dict[int, list[tuple[int, ...]]]:
    jobs = [Job(n, image, key=n) for n, image in enumerate(images)]
    return {
        done.tag: [h.tokens for h in done.hypotheses]
        for done in decode(IterableFeed(jobs), runtime, settings, Shapes(4, 2))
    }
