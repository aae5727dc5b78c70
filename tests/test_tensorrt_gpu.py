"""A real TensorRT on a real GPU: plans that say what `generate()` says, in place and through CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import captioners
import pytest
import torch
from captioners import pictures
from oracle import Case, agrees
from test_tensorrt import BUCKETS, LENGTH, export

from capcli.decoding.shapes import Shapes
from capcli.errors import CapcliError
from capcli.export.tensorrt import build_plans, require_tensorrt, timing_cache_path
from capcli.runtimes import trt
from capcli.runtimes.trt import Replayed, open_trt, this_gpu


def missing() -> str:
    """What there is not; nothing where plans can be built."""
    try:
        require_tensorrt()
    except CapcliError as error:
        return str(error)
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")]


@pytest.mark.parametrize("profile", ["fused", "portable"])
def test_plans_say_what_generate_says(profile, tmp_path_factory, monkeypatch):
    device, module = torch.device("cuda:0"), require_tensorrt()
    model, folder, engine = export("gpt2", profile, tmp_path_factory.mktemp(profile))
    cache = timing_cache_path(str(folder), module.__version__, this_gpu(device))
    build_plans(str(folder), BUCKETS, timing_cache=cache)
    engine = replace(engine, gpu=this_gpu(device), versions={"tensorrt": module.__version__})
    monkeypatch.setattr(captioners, "eager", lambda *_: open_trt(str(folder), engine, device))
    made: list[Replayed] = []

    def kept(plan: trt.Plan, place: torch.device) -> Replayed:
        made.append(Replayed(plan, place))
        return made[-1]

    monkeypatch.setattr(trt, "Replayed", kept)
    for given in ({}, {"num_beams": 3}):
        for prompt in ((), (5, 7)):
            case = Case({"max_new_tokens": LENGTH - 2, **given}, prompt=prompt)
            agrees(model, pictures(9), case, Shapes(4, 2))
            encoder, decoder = made[-2:]
            assert encoder.graphs, "images were never encoded from a CUDA graph"
            assert decoder.graphs, "no step was replayed from a CUDA graph"
            written = [decoder.plan.aliased(f"pool_out_{name}") for name in engine.memory.names]
            if profile == "fused":
                assert written == [f"pool_{name}" for name in engine.memory.names], "the pool is copied at every step"
