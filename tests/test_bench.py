"""`capcli bench`: its measurements are consistent, and baselines that cannot run are reported."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from families import FAMILIES, save_family
from running import VOCABULARY, call, paint, save_captioner

from capcli import Captioner
from capcli.bench import ceiling, run
from capcli.bench.ceiling import CaptionCost, Rates, cost_of
from capcli.bench.output import BenchResult
from capcli.bench.processes import BenchProcess, ProcessResult, Round, run_rounds
from capcli.decoding.settings import resolve
from capcli.models.model_files import collect_files, list_model
from capcli.options import GenerationOptions
from capcli.records import Caption

STAGES = {"list", "read", "decode", "resize", "copy", "encode", "step", "search", "text", "write"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bench")
    save_captioner(place / "captioner")
    paint(place / "photos", *(f"{n}.png" for n in range(6)))
    (place / "photos" / "broken.jpg").write_text("not an image")
    return place


def bench(place: Path, *flags: object) -> tuple[int, list[str], str]:
    fixed = ("--dtype", "float32", "--device", "cpu", "--threads", 1, "--max-new-tokens", 6)
    done = call("bench", place / "photos", "--model", place / "captioner", *fixed, *flags)
    return done.code, done.out.decode().splitlines(), done.err


@pytest.mark.slow
def test_stages_ceiling_and_baselines(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SECONDS": 0.05, "SIDE": 256, "READ": 1 << 22}.items():
        monkeypatch.setattr(ceiling, name, value)
    code, lines, err = bench(place, "--against", "batched,optimum", "--rounds", 2, "--num-beams", 2)
    assert code == 1
    assert "optimum did not run" in err
    assert f"left out because they cannot be decoded: 1, such as {place / 'photos' / 'broken.jpg'}" in err
    found = json.loads(lines[-1])
    assert found["images"] == 6
    assert found["stages"]["each"].keys() == STAGES
    assert all(seconds > 0 for seconds in found["stages"]["each"].values())
    assert found["stages"]["once"].keys() == {"start-up", "load"}
    capcli, batched, optimum = (found["contestants"][name] for name in ("capcli", "batched", "optimum"))
    for process in (capcli, batched):
        assert len(process["seconds"]) == 2
        mean = sum(process["seconds"]) / 2
        assert process["images_per_second"] == pytest.approx(6 / mean, rel=0.5)
    assert batched["equal"] == 1.0
    assert batched["ratio"] == pytest.approx(capcli["images_per_second"] / batched["images_per_second"])
    assert batched["batch_size"] == 6
    assert optimum["failed"].startswith("optimum")
    assert optimum["failed"].endswith(" is missing: give a Python that has it with --peer-python")
    assert "images_per_second" not in optimum
    text = "\n".join(lines[:-1])
    assert f"ceiling, float32: {found['ceiling']:.1f} images/s" in text
    assert f"optimum   could not run: {optimum['failed']}" in text


def test_json_alone_and_an_error_if_capcli_is_too_slow(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*_: object) -> BenchResult:
        rounds = [Round(1.0, {"a.png": "a dog"})]
        capcli, baseline = (ProcessResult(name, {"dtype": "float32"}, rounds) for name in ("capcli", "batched"))
        return BenchResult(1, None, capcli, [baseline])

    monkeypatch.setattr(run, "compare", compare)
    code, lines, err = bench(place, "--quick", "--json", "--against", "batched", "--at-least", 1.5)
    assert code == 1
    assert "capcli is 1.00 times as fast as batched, less than --at-least 1.5" in err
    [line] = lines
    found = json.loads(line)
    assert found.keys() == {"images", "contestants"}
    assert found["contestants"]["batched"]["ratio"] == found["contestants"]["batched"]["equal"] == 1.0
    assert bench(place, "--quick", "--json", "--against", "batched", "--at-least", 0.9)[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--against", "nobody"), "--against nobody: it"),
        (("--at-least", 2), "--at-least compares with"),
        (("--against", "batched,batched"), " twice"),
        (("--against", "batched", "--do-sample"), "leave --do-sample out"),
    ],
)
def test_contradicting_options_are_refused(place: Path, flags: tuple[object, ...], message: str) -> None:
    code, _, err = bench(place, *flags)
    assert code == 2
    assert message in err


def test_no_photos_and_no_python(place: Path, tmp_path: Path) -> None:
    done = call("bench", tmp_path, "--model", place / "captioner")
    assert done.code == 2
    assert "0 images" in done.err
    code, _, err = bench(place, "--quick", "--rounds", 1, "--against", "single", "--peer-python", tmp_path / "python")
    assert code == 1
    assert "python cannot be started: No such file" in err


def test_costs_are_those_of_the_matrices(place: Path) -> None:
    """For a ViT and a GPT-2: two operations for each weight and position, and those of attention."""
    files = collect_files("it", list_model(str(place / "captioner")), None)
    settings = resolve({"decoder_start_token_id": 0}, GenerationOptions(max_new_tokens=8, num_beams=3))
    work = cost_of(files, (32, 32), settings, 5, "float32")
    rows, entries = 3, 3 * 4
    decoder = files.config["decoder"]
    width, layers, vocabulary = decoder["n_embd"], decoder["n_layer"], decoder["vocab_size"]
    inner = decoder.get("n_inner") or 4 * width
    positions = 1 + (32 // files.config["encoder"]["patch_size"]) ** 2
    dense = layers * (4 * width * width + 2 * width * width + 2 * width * inner) + width * vocabulary
    attended = layers * 2 * width * (entries + positions)
    assert work.step_flops == 2 * 5 * rows * (dense + attended)


def test_baselines_run_capclis_own_architectures(place: Path, tmp_path: Path) -> None:
    """For the images alone: a baseline gives the encoder no tags."""
    folder, photos = save_family(tmp_path / "prefix", "prefix"), [str(place / "photos" / f"{n}.png") for n in range(3)]
    search = {name: value for name, value in asdict(GenerationOptions(max_new_tokens=6)).items() if name != "seed"}
    task = {"files": photos, "model": str(folder), "how": "single", "device": "cpu", "threads": 1, "generation": search}
    with BenchProcess("single", [sys.executable, run.BASELINES], task) as process:
        run_rounds([process], 1)
    assert process.result.failed is None
    captioner = Captioner.load(str(folder), device="cpu", dtype="float32")
    expected = [row.text for row in captioner.caption(photos, max_new_tokens=6) if isinstance(row, Caption)]
    assert list(process.result.rounds[0].captions.values()) == expected


def test_a_model_that_no_baseline_can_run_is_refused(place: Path, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "florence2", "florence2")
    done = call("bench", place / "photos", "--model", folder, "--against", "single")
    assert done.code == 2
    assert "takes a prompt, which no baseline supports" in done.err


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_ceiling(family: str, tmp_path: Path) -> None:
    captioner = Captioner.load(str(save_family(tmp_path, family)), device="cpu", dtype="float32").core
    settings = captioner.settings(GenerationOptions(max_new_tokens=8, num_beams=3))
    work = cost_of(captioner.files, captioner.model.size, settings, 5, "float32")
    head = 2 * 5 * 3 * VOCABULARY * 48  # all decoders are 48 wide
    assert head < work.step_flops < 200 * head
    assert work.encode_flops > 1e6
    assert work.step_bytes > 4 * VOCABULARY * 48


def test_a_step_is_limited_by_arithmetic_or_by_memory() -> None:
    work = CaptionCost(encode_flops=100.0, step_flops=50.0, step_bytes=10.0, slots=2)
    assert work.images_per_second(Rates(100.0, 1000.0), tokens=4) == pytest.approx(1 / (1 + 4 * 0.5 / 2))
    assert work.images_per_second(Rates(100.0, 10.0), tokens=4) == pytest.approx(1 / (1 + 4 * 1.0 / 2))


def test_a_task_may_be_longer_than_a_command_line_and_libraries_may_print() -> None:
    script = """
import json, sys
task = json.loads(sys.stdin.readline())
print("a library prints")
print(json.dumps({"files": len(task["files"])}), flush=True)
while sys.stdin.readline().strip() == "go":
    print(json.dumps({"seconds": 2.0, "captions": dict.fromkeys(task["files"][:8], "a dog")}), flush=True)
"""
    broken = "import sys; sys.stdin.readline(); sys.exit('it\\nis broken')"
    task = {"files": [f"{'long' * 500}{n}" for n in range(2000)]}
    with (
        BenchProcess("a", [sys.executable, "-c", script], task) as works,
        BenchProcess("b", [sys.executable, "-c", broken], task) as fails,
    ):
        run_rounds([works, fails], 3)
    assert works.result.facts == {"files": 2000}
    assert (len(works.result.rounds), works.result.rate) == (3, 4.0)
    assert (fails.result.rounds, fails.result.failed) == ([], "is broken")
