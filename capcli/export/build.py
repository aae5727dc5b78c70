"""`capcli export` on one page: captioner -> graphs -> engine -> proof -> the folder that is left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
import transformers

from capcli import __version__, pixels
from capcli.decoding.settings import Settings, resolve
from capcli.engine import ENCODE, ENGINE, STEP, Bucket, Engine, hash_files, is_engine, write_engine
from capcli.errors import CapcliError, ImageError, UsageError
from capcli.export import graphs
from capcli.export.place import building_site, place, put_in_place
from capcli.export.proof import SLOTS, Proof, draw_images, prove, searches
from capcli.export.quantize import quantize
from capcli.export.tidy import share_weights
from capcli.models import files
from capcli.models.attention import use_attention
from capcli.models.build import choose_device, generation_of, load_weights, modules, open_engine, pixel_size
from capcli.models.files import ModelFiles, fingerprint, shelf_of
from capcli.models.hub import find_model
from capcli.models.modules import Step
from capcli.options import MAX_PIXELS, ExportOptions, GenerationOptions, SourceOptions
from capcli.pixels import PixelSpec
from capcli.progress import say, warn
from capcli.runtimes.eager import Eager
from capcli.runtimes.ort import import_onnxruntime, own_device
from capcli.runtimes.seated import DTYPES, Seated
from capcli.sources import open_source

GRAPH_FILES = (ENCODE, f"{ENCODE}.data", STEP, f"{STEP}.data")
UNFINISHED = "its plans are not built yet"
GENERATION = "generation_config.json"
MOST_TOKENS = 64  # of a proof's captions
MOST_VERIFIED = 64  # images of a folder given for the proof


def run(options: ExportOptions) -> int:
    """Build an engine and prove it; the exit code.

    Raises UsageError for what cannot be meant, before the model is loaded, and CapcliError when it cannot be built or fails
    its proof.
    """
    out = place(options)
    onnxruntime = import_onnxruntime()
    device = choose_device(options.device)
    if options.kind == "onnx" and options.device == "auto":
        device = own_device(device)
    paths = listed(options)
    model = find_model(options.model, options.revision, quiet=options.quiet)
    if model.engine is not None:
        raise UsageError(f"{options.model} is an engine already: give the captioner that it was built from")
    if options.threads:
        torch.set_num_threads(options.threads)
    note = silent if options.quiet else say
    refuse_elsewhere(options, device)
    with building_site(out) as building:
        engine = write_graphs(building, options, model, out, note)
        engine = replace(engine, versions={"onnxruntime": onnxruntime.__version__})
        if options.kind == "tensorrt":
            engine = with_plans(building, out, engine, device, note)
        engine = replace(engine, files=hashed(building))
        proof = proved(open_engine(building, engine, device), model, paths, engine, options)
        engine = replace(engine, proof={**proof.facts(), "device": device_name(device)})
        note(proof.line())
        if not proof.passed and not options.force:
            raise CapcliError(f"the engine failed its proof: {proof.failed}. It was not kept; --force keeps it")
        write_engine(building, engine)
        put_in_place(building, out, overwrite=options.overwrite)
    if not proof.passed:
        warn(f"kept by --force, and it failed its proof: {proof.failed}")
    note(f"{out}: {size_of(out) / 1e6:,.1f} MB; capcli caption FOLDER --model {out}")
    return 0


def with_plans(building: str, out: str, engine: Engine, device: torch.device, note: Callable[[str], None]) -> Engine:
    """Plans for the GPU here, in place of the graphs.

    Where TensorRT or a GPU is missing, the graphs that are ready for it stay in `out`, and CapcliError says what is missing
    and what finishes the engine.
    """
    from capcli.export import tensorrt
    from capcli.runtimes.trt import this_gpu

    ready = tensorrt.write_ready(building, (ENCODE, STEP))
    try:
        module = tensorrt.require_tensorrt()
    except CapcliError as missing:
        unfinished = {"passed": False, "failed": UNFINISHED}
        write_engine(building, replace(engine, files=hashed(building), proof=unfinished))
        left = out if not os.path.isdir(out) or not os.listdir(out) else f"{out}-unfinished"
        put_in_place(building, left, overwrite=os.path.isdir(left) and is_engine(left))
        raise CapcliError(
            f"{missing}. The graphs that TensorRT reads are in {left}; where both are, and the captioner, this finishes it: "
            f"{engine.rebuild}"
        ) from missing
    version, gpu = module.__version__, this_gpu(device)
    tensorrt.build_plans(
        building, engine.buckets, timing_cache=tensorrt.timing_cache_path(out, version, gpu), note=note, tensorrt=module
    )
    for name in (*GRAPH_FILES, *ready):
        os.remove(os.path.join(building, name))
    return replace(engine, versions={"tensorrt": version}, gpu=gpu)


def write_graphs(
    folder: str, options: ExportOptions, model: ModelFiles, out: str, note: Callable[[str], None]
) -> Engine:
    """Both graphs, with tokenizer, processor and settings beside them; what engine.json will say but for the proof."""
    spec = PixelSpec.from_config(model.processor)
    whole = load_weights(model, options.dtype, torch.device("cpu"))
    encode, step = modules(whole, spec)
    size = pixel_size(model.name, encode.size, spec, any_size=encode.any_size)
    note(f"exporting {options.model}: {options.profile}, opset {graphs.OPSET[options.profile]}, {options.dtype}")
    first, memory = graphs.encode_graph(encode, size, options.profile)
    second = graphs.step_graph(step, memory, DTYPES[options.dtype], options.profile)
    for name, graph in ((ENCODE, first), (STEP, second)):
        save(quantize(graph) if options.quantize else graph, os.path.join(folder, name))
    for name in files.setting_files(shelf_of(model.folder).names):
        shutil.copyfile(os.path.join(model.folder, name), os.path.join(folder, name))
    with open(os.path.join(folder, GENERATION), "w", encoding="utf-8") as file:
        json.dump(generation_of(model, whole), file, indent=2)
    buckets: tuple[Bucket, ...] = ()
    if options.kind == "tensorrt":
        from capcli.export.tensorrt import make_buckets

        settings = built_for(options, model, whole, step)
        image = memory.positions if memory.prefixed else 0
        buckets = make_buckets(options.batch_sizes, settings.rows, image + settings.entries)
    return Engine(
        kind=options.kind,
        profile=options.profile,
        opset=graphs.OPSET[options.profile],
        dtype=options.dtype,
        quantize=options.quantize,
        captioner={"name": model.name, "revision": model.revision, "fingerprint": fingerprint(model.folder)},
        pixels=size,
        memory=memory,
        positions=step.positions,
        vocabulary=step.vocabulary,
        command=command(options, out),
        buckets=buckets,
        capcli=__version__,
        made_with={"torch": torch.__version__, "transformers": transformers.__version__, "onnx": onnx.__version__},
    )


def command(options: ExportOptions, out: str) -> tuple[str, ...]:
    """What builds the engine again, in its place."""
    given: list[tuple[str, object]] = [
        ("--model", os.path.abspath(options.model) if os.path.isdir(options.model) else options.model),
        ("--out", out),
        ("--revision", options.revision),
        ("--dtype", options.dtype),
    ]
    given += [("--profile", options.profile), ("--quantize", options.quantize)]
    if options.kind == "tensorrt":
        given += [("--num-beams", options.num_beams), ("--max-new-tokens", options.max_new_tokens)]
        given += [("--batch-sizes", ",".join(map(str, options.batch_sizes)))]
    said = [part for name, value in given if value is not None for part in (name, str(value))]
    return ("capcli", "export", "--onnx" if options.kind == "onnx" else "--trt", *said, "--overwrite")


def save(graph: onnx.ModelProto, path: str) -> None:
    """A graph with its weights in one file beside it."""
    share_weights(graph)
    weights = f"{path}.data"
    onnx.save(graph, path, save_as_external_data=True, location=os.path.basename(weights), size_threshold=1024)
    if os.path.exists(weights):
        shutil.copymode(path, weights)  # which onnx leaves readable by its owner alone


def hashed(folder: str) -> dict[str, str]:
    """The SHA-256 of all that captions hang on but the generation settings, which are a user's to change."""
    return hash_files(folder, sorted(set(os.listdir(folder)) - {GENERATION, ENGINE}))


def refuse_elsewhere(options: ExportOptions, device: torch.device) -> None:
    """Raises UsageError for what cannot be proved on this device."""
    if options.kind == "onnx" and options.dtype == "bfloat16" and device.type == "cpu":
        raise UsageError("--dtype bfloat16: ONNX Runtime computes in it on CUDA only, where the export must run then")
    if options.quantize and device.type != "cpu":
        raise UsageError(f"--quantize {options.quantize} is for CPUs: prove it on one, with --device cpu")
    if options.kind == "tensorrt" and options.device == "cpu":
        raise UsageError("--device cpu: plans are built and proved on a GPU; leave it out")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def proved(runtime: Seated, model: ModelFiles, paths: list[str], engine: Engine, options: ExportOptions) -> Proof:
    """Beside PyTorch in float32, whatever the engine computes in."""
    spec = PixelSpec.from_config(model.processor)
    images = loaded(paths, spec, engine.pixels) if paths else draw_images(engine.pixels)
    torch.backends.cudnn.allow_tf32 = False  # the truth is float32 in its convolutions too
    whole = load_weights(model, "float32", runtime.device)
    encode, step = modules(whole, spec)
    use_attention(step.decoder)
    truth = Eager(encode, step, runtime.device, prefixed=encode.prefixed)
    settings = built_for(options, model, whole, step)
    settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, MOST_TOKENS))
    beams = (1, 4) if engine.kind == "onnx" else (settings.rows,)
    batches = [bucket.slots for bucket in engine.buckets] or [SLOTS]
    return prove(runtime, truth, images, searches(settings, beams), options.quantize or options.dtype, batches)


def built_for(options: ExportOptions, model: ModelFiles, whole: Any, step: Step) -> Settings:
    """The search that plans are built for and the proof begins from."""
    own = generation_of(model, whole)
    asked = GenerationOptions(num_beams=options.num_beams, max_new_tokens=options.max_new_tokens)
    settings = resolve(own, asked)
    room = step.positions - len(settings.prompt) + 1
    if options.max_new_tokens is not None and options.max_new_tokens > room:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens}: the decoder holds {room} here")
    return replace(settings, max_new_tokens=min(settings.max_new_tokens, room))


def listed(options: ExportOptions) -> list[str]:
    """The images that `--verify-with` names. Raises UsageError for none."""
    if options.verify_with is None:
        return []
    source = open_source(SourceOptions(sources=(options.verify_with,)), warn, None)
    paths = [entry.path for entry in islice(source, MOST_VERIFIED)]
    if not paths:
        raise UsageError(f"--verify-with {options.verify_with}: there is no image")
    return paths


def loaded(paths: list[str], spec: PixelSpec, size: tuple[int, int]) -> list[npt.NDArray[np.uint8]]:
    """The images of a folder as the captioner sees them; broken ones are passed over. Raises CapcliError for none."""
    found = []
    for path in paths:
        try:
            image = pixels.load(path, spec, max_pixels=MAX_PIXELS)[0]
        except ImageError as error:
            warn(f"--verify-with: {path} is passed over: {error}")
            continue
        if image.shape[:2] == size:
            found.append(image)
        else:
            warn(
                f"--verify-with: {path} is passed over: the processor leaves it at another size than the encoder takes"
            )
    if not found:
        raise CapcliError("--verify-with: none of its images can be used")
    return found


def size_of(folder: str) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def silent(line: str) -> None:
    """Where nothing is to be said."""
