"""`summarize_logits` against `log_softmax` and block maxima: on a CPU, without Triton, and with the Triton kernel.

The kernel runs in Triton's interpreter and is compiled for GPUs of four generations; with a CUDA device it also runs there.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from capcli.decoding.topk import BLOCK, by_log_softmax, by_torch, fused, summarize_logits

SIZES = [3, BLOCK - 1, BLOCK, BLOCK + 1, 20 * BLOCK, 33 * BLOCK + 7]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(seed)) * 5 + seed
    x[0, 1] = -math.inf
    x[0, 1, size // 2] = 3.0
    x[1, 2] = 7.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_log_probabilities_equal_those_of_log_softmax(size: int, dtype: torch.dtype) -> None:
    x = logits(size, dtype)
    found = summarize_logits(x)
    tokens = torch.randint(0, size, (2, 3, 4))
    expected = x.float().log_softmax(-1).gather(2, tokens)
    assert torch.allclose(found.log_probabilities(x, tokens), expected, atol=1e-5)
    whole = size // BLOCK
    assert torch.equal(found.best, x.float()[..., : whole * BLOCK].view(2, 3, whole, BLOCK).amax(-1))
    for by in (by_torch, by_log_softmax):
        for a, b in zip(by(x.float().flatten(0, 1)), (found.best, found.peak, found.log_sum), strict=True):
            assert torch.allclose(a, b.flatten(0, 1), atol=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_value_that_is_not_finite_makes_its_row_nan(wrong: float) -> None:
    x = logits(600, torch.float32)
    x[0, 0, 17] = wrong
    found = summarize_logits(x).log_probabilities(x, torch.zeros(2, 3, 1, dtype=torch.long))[..., 0]
    assert found[0, 0].isnan()
    assert found[0, 2].isfinite()
    assert found[1].isfinite().all()


KERNEL = f"""
import math, torch
from test_topk import DTYPES, SIZES, logits
from capcli.decoding.topk import by_torch
from capcli.decoding.topk_triton import summarize_rows
for size in SIZES:
    for dtype in DTYPES:
        rows = logits(size, dtype, seed=1).flatten(0, 1)
        for found, expected in zip(summarize_rows(rows, {BLOCK}), by_torch(rows.float()), strict=True):
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, atol=1e-5), (size, dtype)
        rows[2, 1] = math.nan
        best, peak, log_sum = summarize_rows(rows, {BLOCK})
        assert log_sum[2].isnan().all() or peak[2].isnan().all()
        assert log_sum[3].isfinite().all()
print("the same", {BLOCK})
"""


COMPILED = f"""
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from capcli.decoding.topk_triton import TOGETHER, read_row
sizes = {{"count": 50257, "whole": 50257 // {BLOCK}, "block": {BLOCK}, "together": TOGETHER}}
for kind in ("fp32", "bf16", "fp16"):
    for generation in (75, 80, 90, 100):
        types = {{"logits": f"*{{kind}}", "best": "*fp32", "peak": "*fp32", "log_sum": "*fp32"}}
        source = ASTSource(fn=read_row, signature=types | dict.fromkeys(sizes, "constexpr"), constexprs=sizes)
        assert compile(source, target=GPUTarget("cuda", generation, 32)).asm["cubin"]
print("the same", {BLOCK})
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton: pip install triton")
@pytest.mark.parametrize(("program", "interpret"), [(KERNEL, "1"), (COMPILED, "0")], ids=["interpreted", "compiled"])
def test_the_kernel_equals_torch(program: str, interpret: str, tmp_path: Path) -> None:
    path = os.pathsep.join((os.path.dirname(__file__), *sys.path))
    env = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == f"the same {BLOCK}\n", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, 50257])
def test_the_kernel_is_used_on_cuda_and_equals_torch(size: int, dtype: torch.dtype) -> None:
    assert fused() is not None, "Triton, or a C compiler for it, is missing"
    x = logits(size, dtype)
    on_gpu, on_cpu = summarize_logits(x.cuda()), summarize_logits(x)
    for name in ("best", "peak", "log_sum"):
        assert torch.allclose(getattr(on_gpu, name).cpu(), getattr(on_cpu, name), atol=1e-4)
