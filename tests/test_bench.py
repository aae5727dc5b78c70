"""`capcli bench`: what it measures adds up, peers say what capcli says, and one that cannot run is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import FAMILIES, save_family
from running import VOCABULARY, call, paint, save_captioner

from capcli import Captioner
from capcli.bench.ceiling import CaptionCost, Rates, cost_of
from capcli.decoding.settings import resolve
from capcli.models.model_files import collect_files, list_model
from capcli.options import GenerationOptions

STAGES = {"list", "read", "decode", "resize", "copy", "encode", "step", "search", "text", "write"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bench")
    save_captioner(place / "captioner")
    paint(place / "photos", *(f"{n}.png" for n in range(6)))
    (place / "photos" / "broken.jpg").write_text("no photo")
    return place


def bench(place: Path, *flags: object) -> tuple[int, list[str], str]:
    steady = ("--dtype", "float32", "--device", "cpu", "--threads", 1, "--max-new-tokens", 6)
    done = call("bench", place / "photos", "--model", place / "captioner", *steady, *flags)
    return done.code, done.out.decode().splitlines(), done.err


def test_stages_ceiling_and_peers_are_told(place: Path) -> None:
    code, lines, err = bench(place, "--against", "single,batched,optimum", "--rounds", 2, "--num-beams", 2)
    assert code == 1
    assert "optimum could not be compared with" in err
    assert f"1 cannot be captioned and is left out, such as {place / 'photos' / 'broken.jpg'}" in err
    told = json.loads(lines[-1])
    assert told["images"] == 6
    assert told["stages"]["each"].keys() == STAGES
    assert all(seconds > 0 for seconds in told["stages"]["each"].values())
    assert told["stages"]["once"].keys() == {"start-up", "load"}
    ours, single, batched, optimum = (told["contestants"][n] for n in ("capcli", "single", "batched", "optimum"))
    for each in (ours, single, batched):
        assert len(each["seconds"]) == 2
        middle = sum(each["seconds"]) / 2
        assert each["images_per_second"] == pytest.approx(6 / middle, rel=0.5)
    for peer in (single, batched):
        assert peer["equal"] == 1.0
        assert peer["ratio"] == pytest.approx(ours["images_per_second"] / peer["images_per_second"])
    assert (single["batch_size"], batched["batch_size"]) == (1, 6)
    assert optimum["failed"].startswith("optimum")
    assert optimum["failed"].endswith(" is missing: give a Python that has it by --peer-python")
    assert "images_per_second" not in optimum
    text = "\n".join(lines[:-1])
    assert f"ceiling, float32: {told['ceiling']:.1f} images/s" in text
    assert f"optimum   could not run: {optimum['failed']}" in text


def test_json_is_all_there_is_and_too_slow_is_a_failure(place: Path) -> None:
    code, lines, err = bench(place, "--quick", "--json", "--rounds", 1, "--against", "batched", "--at-least", 1e6)
    assert code == 1
    assert "times as fast as batched, and 1e+06 were asked for" in err
    [line] = lines
    assert json.loads(line).keys() == {"images", "contestants"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--against", "nobody"), "--against nobody: it is single, batched"),
        (("--at-least", 2), "--at-least compares with a peer"),
        (("--against", "batched,batched"), "names a peer twice"),
        (("--against", "batched", "--do-sample"), "drawn at random"),
    ],
)
def test_what_cannot_be_meant(place: Path, flags: tuple[object, ...], message: str) -> None:
    code, _, err = bench(place, *flags)
    assert code == 2
    assert message in err


def test_no_photos_and_no_python(place: Path, tmp_path: Path) -> None:
    done = call("bench", tmp_path, "--model", place / "captioner")
    assert done.code == 1
    assert "there is no image in" in done.err
    code, _, err = bench(place, "--quick", "--rounds", 1, "--against", "single", "--peer-python", tmp_path / "python")
    assert code == 1
    assert "python cannot be started: No such file" in err


def test_work_is_what_the_matrices_are(place: Path) -> None:
    """Of a ViT and a GPT-2: two operations for each weight and position, and those of attention."""
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


def test_a_captioner_of_capclis_own_kind_has_peers(place: Path, tmp_path: Path) -> None:
    """For the images alone: tags are left out of a contest."""
    folder = save_family(tmp_path / "prefix", "prefix")
    steady = ("--dtype", "float32", "--device", "cpu", "--threads", 1, "--max-new-tokens", 6, "--rounds", 1)
    done = call("bench", place / "photos", "--model", folder, *steady, "--quick", "--json", "--against", "single")
    assert done.code == 0, done.err
    assert json.loads(done.out)["contestants"]["single"]["equal"] == 1.0


def test_what_no_peer_can_run_is_refused(place: Path, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "florence2", "florence2")
    done = call("bench", place / "photos", "--model", folder, "--against", "single")
    assert done.code == 2
    assert "is asked a question, which no peer does" in done.err


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_ceiling(family: str, tmp_path: Path) -> None:
    captioner = Captioner.load(str(save_family(tmp_path, family)), device="cpu", dtype="float32")
    settings = captioner.settings(GenerationOptions(max_new_tokens=8, num_beams=3))
    work = cost_of(captioner.files, captioner.model.size, settings, 5, "float32")
    said = 2 * 5 * 3 * VOCABULARY * 48  # the head alone; all decoders are 48 wide
    assert said < work.step_flops < 200 * said
    assert work.encode_flops > 1e6
    assert work.step_bytes > 4 * VOCABULARY * 48


def test_a_step_is_bound_by_products_or_by_bytes() -> None:
    work = CaptionCost(encode_flops=100.0, step_flops=50.0, step_bytes=10.0, slots=2)
    assert work.images_per_second(Rates(100.0, 1000.0), tokens=4) == pytest.approx(1 / (1 + 4 * 0.5 / 2))
    assert work.images_per_second(Rates(100.0, 10.0), tokens=4) == pytest.approx(1 / (1 + 4 * 1.0 / 2))


def test_names_of_photos_may_be_longer_than_a_command_line(place: Path, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["deep" * 50] * 10)
    photos = paint(folder, *(f"{n:0200}.png" for n in range(120)))
    done = call(
        "bench", photos, "--model", place / "captioner", "--quick", "--json", "--rounds", 1, "--max-new-tokens", 2
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["images"] == 120
