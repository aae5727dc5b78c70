"""Graphs for TensorRT, plans and the runtime over them, with a TensorRT whose plans ONNX Runtime executes on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import captioners
import fake_tensorrt
import numpy as np
import onnx
import pytest
import torch
from captioners import SIZE, captions, pictures
from exporting import cached_graphs, exported
from onnx import TensorProto, helper
from oracle import Case, agrees

from capcli.decoding.loop import IterableFeed, Job, decode
from capcli.decoding.shapes import Shapes
from capcli.engine.engine_json import Bucket, Engine, plan_files, step_plan
from capcli.errors import CapcliError, UsageError
from capcli.export import tensorrt
from capcli.export.parity import check_parity
from capcli.export.parity_images import draw_images
from capcli.export.parser_rules import attribute, lint
from capcli.export.plan_builder import build_plan
from capcli.runtimes import trt
from capcli.runtimes.trt import Replayed, Trt, open_trt
from capcli.runtimes.trt_plan import Plan, Plans, import_tensorrt

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")
LENGTH = 9
BUCKETS = (Bucket(1, 1, 1, LENGTH), Bucket(4, 2, 1, LENGTH), Bucket(4, 2, 3, 3 * LENGTH + 5))


@dataclass(frozen=True)
class Built:
    """A captioner, the folder of its graphs and plans, and the content of its engine.json."""

    model: Any
    folder: Path
    engine: Engine
    tensorrt: SimpleNamespace
    in_place: bool = True

    def runtime(self, **other: Any) -> Trt:
        plans = Plans(self.tensorrt)
        return Trt(replace(self.engine, **other), lambda name: plans.load(str(self.folder / name)), torch.device("cpu"))


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The graphs of a captioner in a folder, written once for a decoder and a profile."""

    @cache
    def written(decoder: str, profile: str) -> tuple[Any, Path, Engine]:
        with cached_graphs(tmp_path_factory):
            return export(decoder, profile, tmp_path_factory.mktemp(f"{decoder} {profile}"))

    return written


def export(decoder: str, profile: str, folder: Path) -> tuple[Any, Path, Engine]:
    captioner = exported(decoder, profile)
    for graph, name in ((captioner.encode_graph, "encode.onnx"), (captioner.step_graph, "step.onnx")):
        copy = onnx.ModelProto()
        copy.CopyFrom(graph)  # `save` moves its weights out
        onnx.save(copy, folder / name, save_as_external_data=True, location=f"{name}.data", size_threshold=512)
    tensorrt.write_ready(str(folder), ("encode.onnx", "step.onnx"))
    image = captioner.memory.image_entries
    engine = Engine(
        kind="tensorrt",
        profile=profile,
        opset=24,
        dtype="float32",
        quantize=None,
        captioner={},
        pixels=(SIZE, SIZE),
        memory=captioner.memory,
        positions=64,
        vocabulary=120,
        command=("capcli", "export", "--trt"),
        capcli="0",
        buckets=tuple(replace(bucket, entries=bucket.entries + image) for bucket in BUCKETS),
    )
    return captioner.model, folder, engine


WAYS = {
    "in place": ("gpt2", "fused", True),
    "two sets in turn": ("gpt2", "fused", False),
    "portable": ("gpt2", "portable", False),
    "bert": ("bert", "fused", True),
    "git": ("git", "portable", False),
    "prefix": ("prefix", "fused", True),
}


@pytest.fixture(scope="session", params=WAYS)
def built(request: pytest.FixtureRequest, graphs: Any) -> Built:
    decoder, profile, in_place = WAYS[request.param]
    model, folder, engine = graphs(decoder, profile)
    module = fake_tensorrt.make(in_place=in_place)
    cache = str(folder.parent / "timings.cache")
    tensorrt.build_plans(str(folder), engine.buckets, timing_cache=cache, tensorrt=module)
    return Built(model, folder, engine, module, in_place)


@pytest.fixture
def captions_with_plans(built: Built, monkeypatch: pytest.MonkeyPatch) -> Built:
    """Makes `captions` and `agrees` caption with the plans in this test."""
    monkeypatch.setattr(captioners, "eager", lambda _, lag=0: lagging(built.runtime(), lag))
    return built


def lagging(runtime: Trt, lag: int) -> Trt:
    runtime.lag = lag
    return runtime


def test_the_pool_is_written_in_place_where_the_plan_does(built):
    name = step_plan(built.engine.buckets[1])
    plan = Plans(built.tensorrt).load(str(built.folder / name))
    shared = {name: plan.aliased(name) for name, port in plan.ports.items() if not port.is_input}
    assert shared.pop("logits") is None
    assert shared == {name: name.replace("_out", "") if built.in_place else None for name in shared}
    plan.bind("logits", 1)
    with pytest.raises(RuntimeError, match="cannot be run: not bound: "):
        plan.run(0)
    with pytest.raises(RuntimeError, match="nothing cannot be bound"):
        plan.bind("nothing", 1)


SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "constrained": {"num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": 0.0, "repetition_penalty": 1.2},
    "sampled": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
}


# All searches with plans of each way of writing the pool, and half of them with each other captioner.
PAIRS = [
    *((way, search) for way in ("in place", "two sets in turn") for search in SEARCHES),
    *((way, search) for way in ("portable", "git") for search in ("beams", "sampled")),
    *((way, search) for way in ("bert", "prefix") for search in ("greedy", "constrained")),
]


@pytest.mark.parametrize(("built", "search"), PAIRS, indirect=["built"])
def test_plans_give_the_captions_of_generate_through_refill(captions_with_plans, search):
    options = {"max_new_tokens": LENGTH, **SEARCHES[search]}
    images = pictures(11)
    lengths = agrees(captions_with_plans.model, images, Case(options), Shapes(4, 2), keys=list(range(11)), lag=1)
    assert len(lengths) >= 3, f"captions of {lengths} tokens test little"


@pytest.mark.parametrize("rows", [1, 3])
def test_prompts_are_written_in_steps_of_as_many_tokens_as_rows(captions_with_plans, rows):
    """Prompts with fewer tokens than a step has rows, as many, and more, while other slots are in use."""
    for prompt in ((5,), (5, 7, 5), (5, 7, 9, 5)):
        room = max(b.entries for b in BUCKETS if b.rows == rows) - len(prompt)
        case = Case({"max_new_tokens": min(6, room // rows), "num_beams": rows}, prompt=prompt)
        agrees(captions_with_plans.model, pictures(7), case, Shapes(4, 2))


def test_a_run_of_fewer_slots_and_entries_takes_a_bigger_bucket(captions_with_plans):
    found = [
        captions(captions_with_plans.model, pictures(5), settings(captions_with_plans, 4), shapes)
        for shapes in (Shapes(4, 2), Shapes(3, 1))
    ]
    tokens = [[[h.tokens for h in hypotheses] for hypotheses in run] for run in found]
    assert tokens[0] == tokens[1]
    agrees(captions_with_plans.model, pictures(3), Case({"max_new_tokens": 4}), Shapes(1, 1))
    agrees(
        captions_with_plans.model, pictures(6), Case({"max_new_tokens": 4}), Shapes(4, 4)
    )  # more than a chunk at a time


def test_the_parity_check_runs_every_plan(built, monkeypatch):
    images, search = draw_images((SIZE, SIZE)), settings(built, LENGTH)

    def check():
        return check_parity(
            built.runtime(), captioners.eager(built.model), images, {"greedy": search}, "float32", (1, 4)
        )

    result = check()
    assert result.passed
    assert [(r.search, r.equal) for r in result.searches] == [("greedy, 1 slots", 16), ("greedy, 4 slots", 16)]
    step = Trt.step

    def wrong_with_four(self: Trt, *inputs: Any) -> Any:
        return step(self, *inputs).roll(1, -1) if len(inputs[0]) == 4 else step(self, *inputs)

    monkeypatch.setattr(Trt, "step", wrong_with_four)
    assert not check().passed


class RecordedGraph:
    """Stands in for a CUDA graph: a captured run is repeated at every replay, with the addresses bound at its capture."""

    recording: RecordedGraph | None = None
    replays = 0

    def __init__(self) -> None:
        self.runs: list[Any] = []

    def replay(self) -> None:
        RecordedGraph.replays += 1
        for run in self.runs:
            run()


@contextmanager
def recorded(graph: RecordedGraph, **_: Any) -> Iterator[None]:
    RecordedGraph.recording = graph
    yield
    RecordedGraph.recording = None


def runs_when_replayed(context: Any, stream: int, run: Any = fake_tensorrt.IExecutionContext.execute_async_v3) -> bool:
    if RecordedGraph.recording is None:
        return bool(run(context, stream))
    twin = fake_tensorrt.IExecutionContext(context.plan)
    twin.bound = dict(context.bound)
    RecordedGraph.recording.runs.append(lambda: run(twin, stream))
    context.bound.clear()  # a later run must bind all tensors again
    return True


def test_a_cuda_graph_is_captured_for_each_binding_at_its_second_run(captions_with_plans, monkeypatch):
    stream = SimpleNamespace(cuda_stream=7, wait_stream=lambda _: None)
    for name, what in {
        "CUDAGraph": RecordedGraph,
        "graph": recorded,
        "device": lambda _: nullcontext(),
        "Stream": lambda _: stream,
        "current_stream": lambda _: stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, what)
    replayed: list[Replayed] = []

    def on_gpu(plan: Plan, _: torch.device) -> Replayed:
        replayed.append(Replayed(plan, torch.device("cuda")))
        return replayed[-1]

    monkeypatch.setattr(trt, "Replayed", on_gpu)
    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "execute_async_v3", runs_when_replayed)
    monkeypatch.setattr(RecordedGraph, "replays", 0)
    agrees(captions_with_plans.model, pictures(9), Case({"max_new_tokens": LENGTH}, prompt=()), Shapes(4, 2))
    encoder, decoder = replayed
    assert len(encoder.graphs) == 1
    assert len(decoder.graphs) == (1 if captions_with_plans.in_place else 2)
    assert RecordedGraph.replays > 10


def settings(built: Built, length: int, **options: Any) -> Any:
    return Case({"max_new_tokens": length, **options}).settings(built.model)


def test_only_the_plans_of_the_bucket_are_loaded_each_once(graphs, tmp_path):
    model, folder, engine = graphs("gpt2", "fused")
    built = Built(model, folder, engine, fake_tensorrt.make())
    tensorrt.build_plans(str(folder), BUCKETS, timing_cache=str(tmp_path / "cache"), tensorrt=built.tensorrt)
    plans, loaded = Plans(built.tensorrt), []
    runtime = Trt(engine, lambda name: loaded.append(name) or plans.load(str(folder / name)), torch.device("cpu"))
    for shapes in (Shapes(4, 2), Shapes(3, 2), Shapes(1, 1), Shapes(4, 2)):
        runtime.allocate(shapes, settings(built, LENGTH))
    step = "step-S{}-R1-N9.plan"
    assert loaded == [
        "encode-E2.plan",
        step.format(4),
        "encode-E1.plan",
        step.format(1),
        "encode-E2.plan",
        step.format(4),
    ]


def test_shapes_are_those_of_a_bucket_and_runs_that_fit_none_are_refused(graphs):
    model, folder, engine = graphs("gpt2", "fused")
    built = Built(model, folder, engine, fake_tensorrt.make())
    runtime = built.runtime()
    assert runtime.shapes(1, settings(built, LENGTH)) == Shapes(1, 1)
    assert runtime.shapes(2, settings(built, 3)) == Shapes(4, 2)
    assert runtime.shapes(200, settings(built, LENGTH, num_beams=3), most=300) == Shapes(4, 2)
    assert runtime.shapes(200, settings(built, LENGTH), most=3) == Shapes(1, 1)
    assert runtime.shapes(200, settings(built, LENGTH, num_beams=3), most=3) == Shapes(4, 2), "no bucket is as small"
    for search in (settings(built, 3, num_beams=2), settings(built, LENGTH + 1)):
        with pytest.raises(UsageError, match="the engine was built for"):
            runtime.shapes(1, search)
    for call, batch in ((runtime.shapes, 5), (runtime.allocate, Shapes(5, 2))):
        with pytest.raises(UsageError, match=r"--batch-size 4 at most, and this run needs 5: .*--batch-sizes 1,4,5\)"):
            call(batch, settings(built, LENGTH))
    memory = engine.memory
    per_slot = 4 * 2 * memory.layers * memory.heads * memory.head_size * (memory.positions + 2 * LENGTH)
    assert runtime.slot_bytes(np.zeros((1, SIZE, SIZE, 3), np.uint8), settings(built, LENGTH)) == per_slot


@pytest.mark.parametrize(
    ("options", "prompt", "message", "advice"),
    [
        ({"num_beams": 2}, (), "--num-beams 2 and --max-new-tokens 9:", "--num-beams 2 --max-new-tokens 9"),
        ({"max_new_tokens": 30}, (), "--num-beams 1 and --max-new-tokens 30:", "--num-beams 1 --max-new-tokens 30"),
        ({}, (5, 7), "plus 2 tokens of a prompt", "--num-beams 1 --max-new-tokens 11"),
        (
            {"do_sample": True, "num_return_sequences": 5},
            (),
            "5 samples per image, which count as --num-beams 5",
            "--num-beams 5 --max-new-tokens 9",
        ),
    ],
)
def test_a_search_without_a_plan_is_refused_with_the_command_that_builds_one(graphs, options, prompt, message, advice):
    model, _, engine = graphs("gpt2", "fused")
    search = Case({"max_new_tokens": LENGTH, **options}, prompt=prompt).settings(model)
    with pytest.raises(UsageError) as refused:
        engine.bucket(1, search)
    text = str(refused.value)
    assert "built for --num-beams 1 and up to --max-new-tokens 9, --num-beams 3 and up to" in text
    assert message in text
    assert f"({engine.rebuild} {advice})" in text


def test_when_memory_runs_out_a_plan_of_fewer_slots_is_used(graphs, tmp_path, monkeypatch):
    model, folder, engine = graphs("gpt2", "fused")
    built = Built(model, folder, engine, fake_tensorrt.make())
    tensorrt.build_plans(str(folder), BUCKETS, timing_cache=str(tmp_path / "cache"), tensorrt=built.tensorrt)
    allocate, shrunk = Trt.allocate, []

    def small(self: Trt, shapes: Shapes, search: Any) -> None:
        if shapes.slots > 1:
            raise MemoryError("no room")
        allocate(self, shapes, search)

    monkeypatch.setattr(Trt, "allocate", small)
    jobs = [Job(number, image) for number, image in enumerate(pictures(3))]
    done = list(decode(IterableFeed(jobs), built.runtime(), settings(built, LENGTH), Shapes(4, 2), shrunk.append))
    assert sorted(caption.tag for caption in done) == [0, 1, 2]
    assert shrunk == [Shapes(1, 1)]
    with pytest.raises(CapcliError, match="not even 4 images at a time fit"):
        list(decode(IterableFeed(jobs), built.runtime(), settings(built, LENGTH, num_beams=3), Shapes(4, 2)))


def test_a_plan_of_other_shapes_or_a_damaged_one_is_refused(graphs, tmp_path):
    model, folder, engine = graphs("gpt2", "fused")
    built = Built(model, tmp_path, engine, fake_tensorrt.make())
    tensorrt.build_plans(str(folder), BUCKETS, timing_cache=str(tmp_path / "cache"), tensorrt=built.tensorrt)
    first, second = "step-S4-R1-N9.plan", "step-S1-R1-N9.plan"
    for name in plan_files(BUCKETS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / first).write_bytes((folder / second).read_bytes())
    with pytest.raises(CapcliError, match=r"step-S4-R1-N9.plan is not the plan .*capcli export"):
        built.runtime().allocate(Shapes(4, 2), settings(built, LENGTH))
    (tmp_path / first).write_bytes(b"something else")
    with pytest.raises(CapcliError, match=r"cannot load .*version does not match"):
        built.runtime().allocate(Shapes(4, 2), settings(built, LENGTH))
    (tmp_path / first).unlink()
    with pytest.raises(CapcliError, match="cannot be read: No such file"):
        built.runtime().allocate(Shapes(4, 2), settings(built, LENGTH))


def test_timings_of_tensorrt_are_kept_and_used_again(graphs, tmp_path):
    _, folder, engine = graphs("gpt2", "fused")
    timings, module, notes = tmp_path / "timings.cache", fake_tensorrt.make(), []
    for _ in range(2):
        found = tensorrt.build_plans(
            str(folder), engine.buckets, timing_cache=str(timings), note=notes.append, tensorrt=module
        )
    assert timings.read_bytes() == b"." * 10  # a dot for every build
    assert list(found) == plan_files(engine.buckets) == sorted({line.removeprefix("building ") for line in notes})
    timings.write_bytes(fake_tensorrt.FOREIGN_TIMINGS)
    tensorrt.build_plans(str(folder), engine.buckets[:1], timing_cache=str(timings), tensorrt=module)
    assert timings.read_bytes() == b".."


def test_buckets_follow_batch_sizes():
    assert tensorrt.make_buckets([64, 1, 8, 8], 4, 80) == (
        Bucket(1, 1, 4, 80),
        Bucket(8, 4, 4, 80),
        Bucket(64, 16, 4, 80),
    )


@pytest.mark.parametrize(("decoder", "profile"), sorted({way[:2] for way in WAYS.values()}))
def test_copies_for_tensorrt_pass_the_lint_that_the_graphs_do_not(graphs, decoder, profile):
    _, folder, _ = graphs(decoder, profile)
    for name, before in (("encode.onnx", "reads uint8"), ("step.onnx", "visible is bool")):
        lines = lint(onnx.load(folder / name, load_external_data=False))
        assert len(lines) == 1
        assert before in lines[0]
        ready = onnx.load(folder / tensorrt.ready_name(name), load_external_data=False)
        assert lint(ready) == []
        attention = [n for n in ready.graph.node if n.op_type == "Attention"]
        assert all(attribute(n, "TRT_decomposable", 0) == 1 for n in attention)
        assert bool(attention) == (profile == "fused")
    assert {path.suffix for path in folder.iterdir()} <= {".onnx", ".data", ".plan"}, (
        "the copies have no weights of their own"
    )


def graph(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], weights: Any = (), opset: int = 24) -> Any:
    def ports(types: dict[str, Any]) -> list[Any]:
        return [helper.make_tensor_value_info(name, *kind) for name, kind in types.items()]

    content = helper.make_graph(nodes, "g", ports(inputs), ports(outputs), weights)
    return helper.make_model(content, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


FLOAT, INT64, UINT8, DOUBLE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8, TensorProto.DOUBLE
QKV = {name: (FLOAT, [2, 3, 4, 5]) for name in ("q", "k", "v")}
CACHE = {"cache": (FLOAT, [2, 3, 9, 5]), "new": (FLOAT, [2, 3, 1, 5]), "at": (TensorProto.INT32, [2])}
ATTENDED = {"y": (FLOAT, [2, 3, 4, 5])}


def scatter(**attributes: Any) -> list[Any]:
    cast = helper.make_node("Cast", ["at"], ["at64"], to=INT64)
    return [cast, helper.make_node("TensorScatter", ["cache", "new", "at64"], ["out"], **{"axis": -2, **attributes})]


BROKEN = {
    "an operator that it lacks": (
        graph(
            [helper.make_node("BitShift", ["x", "x"], ["y"], direction="LEFT")],
            {"x": (UINT8, [2])},
            {"y": (UINT8, [2])},
        ),
        "TensorRT does not support the operator",
    ),
    "another domain": (
        graph(
            [helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")], {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])}
        ),
        "com.microsoft",
    ),
    "int64 in": (
        graph([helper.make_node("Identity", ["x"], ["y"])], {"x": (INT64, [2])}, {"y": (INT64, [2])}),
        "x is int64",
    ),
    "float64 within": (
        graph(
            [helper.make_node("Cast", ["x"], ["d"], to=DOUBLE), helper.make_node("Cast", ["d"], ["y"], to=FLOAT)],
            {"x": (FLOAT, [2])},
            {"y": (FLOAT, [2])},
        ),
        "casts to float64",
    ),
    "axes that are computed": (
        graph(
            [helper.make_node("Shape", ["x"], ["a"]), helper.make_node("ReduceSum", ["x", "a"], ["y"], keepdims=0)],
            {"x": (FLOAT, [1])},
            {"y": (FLOAT, None)},
        ),
        "its axes a are computed",
    ),
    "a newer opset": (
        graph([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])}, opset=26),
        "opset 26 is newer",
    ),
    "causal attention": (
        graph([helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)], QKV, ATTENDED),
        "has the attribute is_causal",
    ),
    "attention with a past": (
        graph([helper.make_node("Attention", ["q", "k", "v", "", "k", "v"], ["y"])], QKV, ATTENDED),
        "has the input past_key",
    ),
    "attention with padding": (
        graph(
            [helper.make_node("Attention", ["q", "k", "v", "", "", "", "n"], ["y"])],
            {**QKV, "n": (TensorProto.INT32, [2])},
            ATTENDED,
        ),
        "has the input nonpad_kv_seqlen",
    ),
    "attention with a present": (
        graph([helper.make_node("Attention", ["q", "k", "v"], ["y", "p"])], QKV, ATTENDED),
        "has more than one output",
    ),
    "attention on three axes": (
        graph(
            [helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=1, kv_num_heads=1)],
            {name: (FLOAT, [2, 4, 5]) for name in "qkv"},
            {"y": (FLOAT, [2, 4, 5])},
        ),
        "Q is not known to be 4-D",
    ),
    "attention with a flat mask": (
        graph(
            [helper.make_node("Attention", ["q", "k", "v", "m"], ["y"])],
            {**QKV, "m": (FLOAT, [4, 4])},
            ATTENDED,
        ),
        "attn_mask is not known to be 4-D",
    ),
    "a scatter in a circle": (graph(scatter(mode="circular"), CACHE, {"out": CACHE["cache"]}), "mode is not linear"),
    "a scatter along heads": (graph(scatter(axis=1), CACHE, {"out": CACHE["cache"]}), "its axis is 1"),
    "a scatter that is kept inside": (
        graph([*scatter(), helper.make_node("Relu", ["out"], ["y"])], CACHE, {"y": CACHE["cache"]}),
        "the result out is not an output",
    ),
    "a scatter into what was computed": (
        graph(
            [helper.make_node("Relu", ["x"], ["cache"]), *scatter()],
            {"x": CACHE["cache"], "new": CACHE["new"], "at": CACHE["at"]},
            {"out": CACHE["cache"]},
        ),
        "the cache cache is not an input",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_lint_reports_what_tensorrt_refuses(name, tmp_path):
    model, complaint = BROKEN[name]
    assert any(complaint in line for line in lint(model)), lint(model)
    onnx.save(model, tmp_path / "g.onnx")
    if name == "float64 within":
        assert lint(tensorrt.trt_ready(model)) == []
    else:
        with pytest.raises(CapcliError, match=r"TensorRT would reject .*g\.onnx"):
            tensorrt.write_ready(str(tmp_path), ["g.onnx"])


def test_float64_becomes_float32_everywhere():
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], to=DOUBLE),
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", DOUBLE, [1], [0.5])),
        helper.make_node("Mul", ["d", "w"], ["m"]),
        helper.make_node("Add", ["m", "c"], ["y"]),
    ]
    model = graph(nodes, {"x": (UINT8, [3])}, {"y": (DOUBLE, [3])}, [helper.make_tensor("w", DOUBLE, [1], [1 / 3])])
    report = " ".join(lint(model))
    assert all(
        line in report for line in ("Cast: casts to float64", "Constant: has a float64 constant", "w is float64")
    )
    ready = tensorrt.trt_ready(model)
    assert lint(ready) == []
    onnx.checker.check_model(ready, full_check=True)
    import onnxruntime

    x = np.array([0, 7, 255], np.uint8)
    result = onnxruntime.InferenceSession(ready.SerializeToString()).run(None, {"x": x})[0]
    assert result.dtype == np.float32
    assert np.allclose(result, x / 3 + 0.5, rtol=1e-6)


def test_errors_have_the_reasons_of_tensorrt(tmp_path):
    x = {"x": (FLOAT, [2, 2])}
    onnx.save(graph([helper.make_node("MatMulInteger", ["x", "x"], ["y"])], x, {"y": x["x"]}), tmp_path / "a.onnx")
    onnx.save(graph([helper.make_node("Det", ["x"], ["y"])], x, {"y": (FLOAT, [])}), tmp_path / "b.onnx")
    build = (fake_tensorrt.make(), {}, str(tmp_path / "cache"))
    with pytest.raises(CapcliError, match=r"cannot read .*a.onnx: no importer for MatMulInteger"):
        build_plan(build[0], str(tmp_path / "a.onnx"), *build[1:])
    with pytest.raises(CapcliError, match=r"cannot build a plan of .*b.onnx at .*no kernel was found"):
        build_plan(build[0], str(tmp_path / "b.onnx"), *build[1:])


def test_a_missing_gpu_and_a_missing_or_old_tensorrt_are_errors(monkeypatch, graphs):
    _, folder, engine = graphs("gpt2", "fused")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(CapcliError, match=r"TensorRT is missing: pip install 'capcli\[trt\]'"):
        tensorrt.build_plans(str(folder), BUCKETS, timing_cache="")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    with pytest.raises(CapcliError, match=r"TensorRT 10.3.0 is too old: 10.15 or newer"):
        import_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make())
    assert import_tensorrt().__version__ == "10.15.1.29"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CapcliError, match=r"no CUDA GPU here .* built on the NVIDIA GPU that they will run on"):
        tensorrt.build_plans(str(folder), BUCKETS, timing_cache="")
    with pytest.raises(CapcliError, match="contains TensorRT plans, which run on an NVIDIA GPU, and the device is cpu"):
        open_trt(str(folder), engine, torch.device("cpu"))


def test_a_broken_tensorrt_has_another_error_than_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CapcliError, match=r"installed but cannot be loaded \(ImportError: libnvinfer.so.10"):
        import_tensorrt()
