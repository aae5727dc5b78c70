"""The command line of `capcli`: help, options and usage errors; and the sources, rows, failures and files of `capcli caption`."""

from __future__ import annotations

import base64
import csv
import gc
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from running import call, change_json, environment, paint, save_captioner
from safetensors.torch import load_file, save_file

import capcli
from capcli.cli import cli
from capcli.cli.click_options import TokenIds
from capcli.errors import UsageError
from capcli.options import (
    CaptionOptions,
    DataOptions,
    GenerationOptions,
    ModelOptions,
    SinkOptions,
    SourceOptions,
    TrainOptions,
)

HEAVY = ("PIL", "huggingface_hub", "numpy", "rich", "torch", "transformers")
TREE = ("a.png", b"caf\xe9.gif", "new\nline.png", "quo'te\".bmp", "sub/b.jpg", "sub/c d.webp", "sub/deep/e.tif")


@pytest.fixture(autouse=True)
def decode_in_this_process(monkeypatch: pytest.MonkeyPatch):
    """Without decoder processes, whose start takes longer than most runs; a test that needs them gives --workers."""
    monkeypatch.setenv("CAPCLI_CAPTION_WORKERS", "0")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    paint(tmp_path / "photos", *TREE)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def names(rows: list[dict[str, Any]]) -> list[bytes]:
    """The file names of rows as bytes."""
    return [
        base64.b64decode(row["file_name_bytes"]) if row.get("file_name_bytes") else row["file_name"].encode()
        for row in rows
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))


def run_file(out: Path) -> dict[str, Any]:
    """The run file beside an output file."""
    content: dict[str, Any] = json.loads(out.with_suffix(".run.json").read_text())
    return content


# Help and options


SEVERAL_COMMANDS = f"""
import json, sys
from capcli.cli import main
for arguments in json.load(sys.stdin):
    sys.argv = ["capcli", *arguments]
    try:
        main()
    except SystemExit as exit:
        print("code", exit.code or 0)
print("heavy", sorted(set(sys.modules) & set({HEAVY!r})))
"""


def run_in_new_process(*commands: list[str]) -> list[str]:
    """The output of commands that run one after the other in a new process, and the heavy packages that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_COMMANDS], input=json.dumps(commands).encode(), capture_output=True, check=True
    )
    return done.stdout.decode().splitlines()


def test_help_and_version_import_nothing_heavy():
    helps = [[name, flag] for name in cli.commands for flag in ("--help", "-h")]
    output = run_in_new_process(["--version"], ["--help"], ["-h"], *helps)
    assert output[0].startswith("capcli, version ")
    assert output.count("code 0") == 3 + len(helps)
    assert output[-1] == "heavy []"


def test_a_wrong_option_is_refused_before_anything_heavy_is_imported():
    wrong = [
        ["nosuch"],
        [],
        ["caption", "--nosuch"],
        ["caption", ".", "--fields", "width,nosuch"],
        ["caption", ".", "--early-stopping", "perhaps"],
        ["caption", ".", "--threads", "0"],
        ["caption", ".", "--batch-size", "0"],
        ["caption", ".", "--workers", "-1"],
        ["caption", ".", "--workers", "many"],
        ["caption", ".", "--num-beams", "none"],
        ["caption", ".", "--temperature", "0"],
        ["caption", ".", "--temperature", "nan"],
        ["caption", ".", "--top-p", "1.5"],
        ["caption", ".", "--limit", "-1"],
        ["caption", ".", "--decode-timeout", "0"],
        ["caption", ".", "--decode-timeout", "nan"],
        ["caption", ".", "--length-penalty", "nan"],
        ["caption", ".", "--format", "xml"],
        ["caption", ".", "--device", "abacus"],
    ]
    output = run_in_new_process(*wrong)
    assert [line for line in output if line.startswith("code")] == ["code 2"] * len(wrong)
    assert output[-1] == "heavy []"


def every_option() -> Iterator[tuple[click.Command, click.Option]]:
    for command in cli.commands.values():
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden:
                yield command, param


def sample(option: click.Option) -> str:
    """A value for an option that is not its default."""
    kind = option.type
    if isinstance(kind, click.Choice):
        return str(next(choice for choice in reversed(kind.choices) if choice != option.default))
    if option.is_bool_flag:
        return "0" if option.default is True else "1"
    if option.name == "fields":
        return "width,sha256"
    if isinstance(kind, TokenIds):
        return "12,5"
    if option.multiple:
        return "*.tif thumbs/**"
    if isinstance(kind, click.IntRange):
        return str(max(3, kind.min or 0))
    return "cpu" if option.name == "device" else "0.5" if isinstance(kind, click.FloatRange) else "3"


def test_every_option_has_a_help_text():
    lacking = [option.name for _, option in every_option() if not re.search(r"[.\]]$", option.help or "")]
    assert not lacking


def needed(command: click.Command, option: click.Option) -> list[str]:
    """The arguments that a command requires besides an option."""
    arguments = ["x"] * any(isinstance(param, click.Argument) for param in command.params)
    for other in command.params:
        if isinstance(other, click.Option) and other.required and other is not option:
            arguments += [other.opts[-1], "y"]
    return arguments


def test_every_option_can_be_set_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for command, option in every_option():
        value, name = sample(option), str(option.name)
        flag = option.opts[-1]
        if name in ("config", "recipe"):
            value = str(tmp_path / f"{command.name}.toml")
            Path(value).write_text(f"[{command.name}]\nquiet = true\n")
        values = value.split() if option.multiple else [value]
        if option.is_bool_flag:
            typed = [flag if value == "1" else option.secondary_opts[-1]]
        else:
            typed = [part for one in values for part in (flag, one)]
        prefix = f"CAPCLI_{str(command.name).upper()}"
        rest = needed(command, option)

        def parsed(
            *arguments: str, command: click.Command = command, prefix: str = prefix, rest: list[str] = rest
        ) -> dict[str, Any]:
            context = command.make_context(
                str(command.name), [*rest, *arguments], auto_envvar_prefix=prefix, **cli.context_settings
            )
            return context.params

        plain, expected = {} if option.required else parsed(), parsed(*typed)
        separator = option.type.envvar_list_splitter or " "  # for paths, that of the system
        monkeypatch.setenv(f"{prefix}_{name.upper()}", separator.join(values))
        assert parsed() == expected, name
        monkeypatch.delenv(f"{prefix}_{name.upper()}")
        assert expected.get(name) != plain.get(name) or not option.expose_value, name


def test_environment_variables_reach_the_run(captioner: Path, photos: Path, tmp_path: Path):
    settings = {"NUM_BEAMS": "4", "FIELDS": "width", "OUT": str(tmp_path / "c.jsonl"), "EXCLUDE": "sub *.gif"}
    env = {f"CAPCLI_CAPTION_{name}": value for name, value in {**settings, "EARLY_STOPPING": "never"}.items()}
    assert call("caption", photos, "-m", captioner, env=env).code == 0
    generation = run_file(tmp_path / "c.jsonl")["settings"]["generation"]
    assert (generation["num_beams"], generation["early_stopping"]) == (4, "never")
    assert [set(row) for row in lines(tmp_path / "c.jsonl")] == [{"file_name", "text", "score", "width"}] * 3


def test_a_shell_can_complete_options():
    def completion(**variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "capcli"], env=environment(**variables), capture_output=True, check=True
        )
        return done.stdout.decode()

    assert "_capcli_completion" in completion(_CAPCLI_COMPLETE="bash_source")
    typed = {"COMP_WORDS": "capcli caption --num-", "COMP_CWORD": "2"}
    completions = completion(_CAPCLI_COMPLETE="bash_complete", **typed).split()
    assert completions == ["plain,--num-beams", "plain,--num-return-sequences"]


DATA = DataOptions(data=("captions.csv",))
MODEL = ModelOptions(model="captioner")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: GenerationOptions(num_beams=0), "num_beams is 0; it must be a whole number of at least 1"),
        (lambda: GenerationOptions(num_beams=True), "num_beams is True"),
        (lambda: GenerationOptions(num_beams=2.5), "num_beams is 2.5"),  # type: ignore[arg-type]
        (lambda: GenerationOptions(temperature=float("nan")), "temperature is nan; it must be a number above 0"),
        (lambda: GenerationOptions(length_penalty=101), "a number of at least -100 and at most 100"),
        (lambda: GenerationOptions(early_stopping="maybe"), "must be true, false or never"),  # type: ignore[arg-type]
        (lambda: SinkOptions(format="xml"), "--format is 'xml'; it must be jsonl, csv or csv-excel"),  # type: ignore[arg-type]
        (lambda: CaptionOptions(SourceOptions(), SinkOptions(), batch_size=0), "--batch-size is 0"),
        (lambda: DataOptions(val_fraction=1.0), "--val-fraction is 1.0; it must be a number above 0 and below 1"),
        (lambda: DataOptions(val_limit=1.5), "--val-limit is 1.5; it must be a number of images"),
        (
            lambda: ModelOptions(model="m", vocab_size=258),
            "--vocab-size is 258; it must be a whole number of at least 259",
        ),
        (lambda: TrainOptions(DATA, MODEL, "out", save_every=0), "must be epoch or a whole number of at least 1"),
        (lambda: TrainOptions(DataOptions(("c.csv",), seed=-1), MODEL, "out"), "--seed is -1"),
    ],
)
def test_options_refuse_values_out_of_their_limits(options: Any, message: str):
    with pytest.raises(UsageError, match=re.escape(message)):
        options()


def test_a_command_leaves_the_garbage_collector_as_it_was():
    before = gc.get_threshold(), gc.get_freeze_count()
    assert call("--version").code == 0
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


# Errors


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch):
    """Fails the test if weights are loaded."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no source"),
        ("nosuch.jpg", "nosuch.jpg: no such file or folder"),
        ("photos 'nosuch/*.jpg'", "no file with an image suffix matches"),
        ("- -", "given twice"),
        ("photos -0", "there is no list"),
        ("--from-file nosuch.txt", "cannot read the list nosuch.txt"),
        ("photos/a.png --include '*.png'", "no SOURCE is one"),
        ("photos -o photos/a.png/c.jsonl", "photos/a.png is not a folder"),
        ("photos -o c.xml", "name it .jsonl or .csv"),
        ("photos -o photos", "--out photos"),
        ("photos -o /dev/full --format jsonl", "not a regular file"),
        ("photos -o c.jsonl --failures c.jsonl", "need different names"),
        ("photos --sidecar-dir texts", "--sidecar"),
        ("photos --overwrite", "--overwrite starts a file from scratch: name it with --out"),
        ("photos -o - --overwrite", "name it with --out"),
        ("photos --retry-failed", "--retry-failed needs the list of failures"),
        ("photos --retry-failed --failures f.jsonl", "name its file with --out"),
        ("photos --retry-failed --sidecar .txt", "name its file with --out"),
        ("photos --min-new-tokens 3 --max-new-tokens 2 -m nosuch", "--min-new-tokens is 3, which is more than --max"),
        ("photos -m ./nosuch", "No such folder: './nosuch'"),
        ("photos -m captioner --revision main", "--revision is for models on the hub"),
        ("photos -m captioner --device cuda:99", "--device cuda:99"),
        ("photos -m captioner --num-return-sequences 3", "--num-beams 3"),
        ("photos -m captioner --num-return-sequences 3 --num-beams 2", "--num-beams 3"),
    ],
)
def test_wrong_usage_is_one_line_and_refused_before_weights_are_loaded(
    arguments: str, message: str, captioner: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(photos.parent)
    Path("captioner").symlink_to(captioner)
    before = sorted(photos.parent.rglob("*"))
    ended = call("caption", *shlex.split(arguments))
    assert (ended.code, ended.out) == (2, b"")
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert "Traceback" not in ended.err
    assert sorted(photos.parent.rglob("*")) == before


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("field", [{"guidance_scale": 3.0}, {"penalty_alpha": 0.6}, {"made_up_field": 7}])
def test_an_unsupported_field_of_the_generation_config_is_named(field: dict[str, Any], photos: Path, tmp_path: Path):
    model = save_captioner(tmp_path / "odd", generation=field)
    ended = call("caption", photos, "-m", model)
    assert ended.code == 1
    ((name, value),) = field.items()
    assert f"{name}={value}" in ended.err


def test_debug_prints_the_traceback_of_an_error(photos: Path):
    plain = call("caption", photos, "-m", "./nosuch")
    for ended in (
        call("caption", photos, "-m", "./nosuch", "--debug"),
        call("caption", photos, "-m", "./nosuch", env={"CAPCLI_CAPTION_DEBUG": "yes"}),
    ):
        assert ended.code == plain.code == 2
        assert "Traceback" in ended.err
        assert ended.err.endswith(plain.err)
    assert "Traceback" not in plain.err


def test_an_unexpected_error_is_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("capcli.captioning.pipeline.run", fail)
    ended = call("caption", photos)
    message = "capcli: unexpected ZeroDivisionError: by zero (--debug prints the traceback)\n"
    assert (ended.code, ended.err) == (1, message)


# Sources


@pytest.mark.usefixtures("photos")
def test_sources_of_every_kind_are_captioned_in_order(captioner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    every = [os.fsencode(name) for name in TREE]
    top = every[:4]
    within = [b"photos/" + name for name in every]
    listed = b"photos/sub/c d.webp\nphotos/a.png\n"
    (tmp_path / "list.txt").write_bytes(listed)
    null = b"\0".join([within[2], within[1], within[3]]) + b"\0"
    (tmp_path / "list.nul").write_bytes(null)
    for arguments, stdin, expected in (
        (["photos"], b"", every),
        (["photos", "--no-recursive"], b"", top),
        (["photos", "--include", "*.tif", "--include", "*.gif"], b"", [every[1], every[6]]),
        (["photos", "--exclude", "sub/*.jpg", "--exclude", "deep"], b"", [*top, every[5]]),
        (["photos/a.png"], b"", within[:1]),
        (["photos/sub", "photos/a.png"], b"", [*within[4:], within[0]]),
        (["photos/**/*.[jt]*"], b"", [within[4], within[6]]),
        (["-"], listed, [within[5], within[0]]),
        (["-", "-0"], null, [within[2], within[1], within[3]]),
        (["--from-file", "list.txt"], b"", [within[5], within[0]]),
        (["--from-file", "list.nul", "-0"], b"", [within[2], within[1], within[3]]),
        (["--from-file", "-", "photos/a.png"], listed, [within[0], within[5], within[0]]),
    ):
        ended = call("caption", *arguments, "-m", captioner, stdin=stdin)
        assert ended.code == 0, ended.err
        assert names(ended.rows) == expected, arguments


def test_captions_do_not_depend_on_how_images_are_listed(captioner: Path, photos: Path):
    folder = call("caption", photos, "-m", captioner).rows
    single = call("caption", photos / "sub/b.jpg", "-m", captioner, "--batch-size", 32).rows
    assert single[0]["text"] == folder[4]["text"]
    assert single[0]["score"] == folder[4]["score"]


# Rows


def test_captions_do_not_depend_on_workers_or_batch_size(captioner: Path, tmp_path: Path):
    paint(tmp_path / "photos", *(f"{n:02d}.png" for n in range(12)))
    (tmp_path / "photos" / "07a.png").write_bytes(b"broken")

    def out(*arguments: object) -> bytes:
        ended = call("caption", tmp_path / "photos", "-m", captioner, "--dtype", "float32", *arguments)
        assert ended.code == 3
        return ended.out

    greedy = out()
    assert greedy.count(b"\n") == 12
    for workers in ("auto", 1, 2):
        assert out("--workers", workers) == greedy
    for search in ([], ["--num-beams", 3, "--num-return-sequences", 2]):
        texts = [json.loads(line)["text"] for line in out(*search, "--workers", 2).splitlines()]
        for size in (1, 2, 7):
            assert [json.loads(line)["text"] for line in out(*search, "--batch-size", size).splitlines()] == texts
    done = out("--order", "done", "--batch-size", 4)
    assert sorted(done.splitlines()) == sorted(out("--batch-size", 4).splitlines())


def test_several_captions_are_sorted_by_score(captioner: Path, photos: Path):
    rows = call("caption", photos, "-m", captioner, "--num-beams", 4, "--num-return-sequences", 3).rows
    for row in rows:
        assert len(row["candidates"]) == 3
        assert {"text": row["text"], "score": row["score"]} == row["candidates"][0]
        assert len({candidate["text"] for candidate in row["candidates"]}) == 3


def test_sampling_is_reproducible_by_seed(captioner: Path, photos: Path):
    def sampled(*arguments: object) -> list[list[str]]:
        rows = call("caption", photos, "-m", captioner, "--do-sample", "--num-return-sequences", 4, *arguments).rows
        return [[candidate["text"] for candidate in row["candidates"]] for row in rows]

    three = sampled("--seed", 3)
    assert sampled("--seed", 3) == three
    assert sampled("--seed", 4) != three
    assert any(len(set(texts)) > 1 for texts in three)


def test_fields_add_properties_of_the_image_file(captioner: Path, photos: Path, tmp_path: Path):
    fields = ["sha256", "width", "height", "format", "mode", "bytes"]
    rows = call("caption", photos, "-m", captioner, "--fields", ",".join(fields)).rows
    for row, name in zip(rows, names(rows), strict=True):
        data = Path(os.fsdecode(os.fsencode(photos) + b"/" + name)).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            facts = [hashlib.sha256(data).hexdigest(), *image.size, image.format, image.mode, len(data)]
        assert [row[field] for field in fields] == facts
        assert list(row)[:9] == ["file_name", "text", "score", *fields]
    assert call("caption", photos, "-m", captioner, "--fields", "width", "-o", tmp_path / "c.csv").code == 0
    assert [int(row["width"]) for row in table(tmp_path / "c.csv")] == [row["width"] for row in rows]


def test_csv_contains_the_same_values_as_json_lines(captioner: Path, photos: Path, tmp_path: Path):
    search = ["-m", captioner, "--num-beams", 2, "--num-return-sequences", 2]
    rows = call("caption", photos, *search).rows
    assert call("caption", photos, *search, "-o", tmp_path / "c.csv").code == 0
    cells = table(tmp_path / "c.csv")
    assert names(cells) == names(rows)
    for cell, row in zip(cells, rows, strict=True):
        assert (cell["text"], float(cell["score"])) == (row["text"], row["score"])
        assert json.loads(cell["candidates"]) == row["candidates"]
    piped = call("caption", photos, *search, "--format", "csv")
    assert piped.out.startswith(b"file_name,text,score,candidates")
    assert piped.out.count(b"\r\n") == 0


def test_the_prompt_is_removed_from_captions_without_keep_prompt(captioner: Path, photos: Path):
    plain = call("caption", photos, "-m", captioner).rows
    prompted = call("caption", photos, "-m", captioner, "--prompt", "word30 word31").rows
    kept = call("caption", photos, "-m", captioner, "--prompt", "word30 word31", "--keep-prompt").rows
    assert [row["text"] for row in prompted] != [row["text"] for row in plain]
    assert [row["text"] for row in kept] == [f"word30 word31 {row['text']}".strip() for row in prompted]


def test_generation_settings_of_the_checkpoint_apply_and_are_recorded(photos: Path, tmp_path: Path):
    settings = {
        "num_beams": 3,
        "length_penalty": 2.0,
        "early_stopping": True,
        "no_repeat_ngram_size": 1,
        "max_new_tokens": 7,
    }
    model, plain = save_captioner(tmp_path / "own", generation=settings), save_captioner(tmp_path / "plain")
    out = tmp_path / "c.jsonl"
    assert call("caption", photos, "-m", model, "-o", out).code == 0
    generation = run_file(out)["settings"]["generation"]
    assert {name: generation[name] for name in settings} == settings
    flags = ["--num-beams", 3, "--length-penalty", 2, "--early-stopping", "true", "--no-repeat-ngram-size", 1]
    by_flags = call("caption", photos, "-m", plain, *flags, "--max-new-tokens", 7)
    assert by_flags.out == out.read_bytes()
    assert call("caption", photos, "-m", plain).out != by_flags.out


# Failures


def corrupt_images(folder: Path) -> dict[str, str]:
    """Writes three images and files that are no valid images; returns the error code of each invalid file, by name."""
    whole = (paint(folder, "0-whole.jpg", "5-whole.png", "z-whole.webp") / "0-whole.jpg").read_bytes()
    png, webp = (folder / "5-whole.png").read_bytes(), (folder / "z-whole.webp").read_bytes()
    huge = bytearray(png)
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    files = {
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": png[: len(png) // 2],
        "cut.webp": webp[: len(webp) // 2],
        "empty.jpg": b"",
        "garbage.gif": b"GIF89a" + bytes(range(256)),
        "header.tif": b"II*\0\xff\xff\xff\xff",
        "huge.png": bytes(huge),
        "letter.jpg": b"Dear all, this is no picture.\n",
        "noise.bmp": b"BM" + os.urandom(300),
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "zeros.jpg": whole[: len(whole) // 2] + bytes(len(whole) // 2),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "nowhere.png").symlink_to("gone.png")
    return dict.fromkeys(files, "unreadable") | {
        "empty.jpg": "empty",
        "huge.png": "too-large",
        "letter.jpg": "unknown-format",
        "nowhere.png": "missing",
        "script.png": "no-decoder",
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_each_corrupt_image_is_one_failure(captioner: Path, tmp_path: Path, workers: int):
    kinds = corrupt_images(tmp_path / "photos")
    out = tmp_path / "c.jsonl"
    ended = call("caption", tmp_path / "photos", "-m", captioner, "-o", out, "--workers", workers)
    assert ended.code == 3
    assert names(lines(out)) == [b"0-whole.jpg", b"5-whole.png", b"z-whole.webp"]
    failures = lines(tmp_path / "c.failures.jsonl")
    assert [row["file_name"] for row in failures] == sorted(kinds)
    assert {row["file_name"]: row["error"] for row in failures} == kinds
    assert all(row["message"] and "\n" not in row["message"] for row in failures)
    assert run_file(out)["counts"] == {"captions": 3, "failures": len(kinds)}
    assert ended.err.startswith(f"3 captioned, 0 skipped, {len(kinds)} failed")
    assert ended.err.rstrip().endswith(f"failures are listed in {tmp_path / 'c.failures.jsonl'}")


def test_failures_are_printed_without_a_failure_list(captioner: Path, photos: Path, tmp_path: Path):
    (photos / "b.png").write_bytes(b"not an image")
    printed = call("caption", photos, "-m", captioner)
    assert (printed.code, printed.err.count("b.png")) == (3, 1)
    listed = call("caption", photos, "-m", captioner, "--failures", tmp_path / "f.jsonl")
    assert (listed.code, listed.err.count("b.png")) == (3, 0)
    assert [row["file_name"] for row in lines(tmp_path / "f.jsonl")] == ["b.png"]
    assert listed.out == printed.out


def test_retry_failed_captions_repaired_images(captioner: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    good = (photos / "a.png").read_bytes()
    for name in ("b.png", "c.png"):
        (photos / name).write_bytes(b"not an image")
    command = ["caption", photos, "-m", captioner, "-o", out]
    assert call(*command).code == 3
    (photos / "b.png").write_bytes(good)
    again = call(*command)
    assert (again.code, b"b.png" in out.read_bytes()) == (3, False)
    assert "0 captioned, 9 skipped, 0 failed (2 failed before: --retry-failed tries them again)" in again.err
    retried = call(*command, "--retry-failed")
    assert retried.code == 3
    assert "1 captioned, 7 skipped, 1 failed" in retried.err
    assert [row["file_name"] for row in lines(tmp_path / "c.failures.jsonl")] == ["c.png"]
    assert run_file(out)["counts"] == {"captions": 8, "failures": 1}
    assert "(1 failed before: --retry-failed tries it again)" in call(*command).err
    (photos / "c.png").write_bytes(good)
    assert call(*command, "--retry-failed").code == 0
    assert not (tmp_path / "c.failures.jsonl").exists()
    assert len(lines(out)) == 9


def test_weights_that_are_not_finite_give_failures(photos: Path, tmp_path: Path):
    for part in ("encoder", "decoder"):
        model = save_captioner(tmp_path / part)
        weights = load_file(model / "model.safetensors")
        name = next(name for name in sorted(weights) if name.startswith(part) and weights[name].dim() == 2)
        weights[name] = torch.full_like(weights[name], torch.nan)
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        ended = call("caption", photos, "-m", model, "--failures", tmp_path / f"{part}.jsonl")
        assert (ended.code, ended.out) == (3, b"")
        assert {row["error"] for row in lines(tmp_path / f"{part}.jsonl")} == {"not-finite"}
        assert len(lines(tmp_path / f"{part}.jsonl")) == len(TREE)


def test_an_image_that_does_not_fit_the_encoder_is_a_failure(tmp_path: Path):
    model = save_captioner(tmp_path / "model", processor={"do_resize": False})
    photos = paint(tmp_path / "photos", "large.png")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(photos / "fits.png")
    ended = call("caption", photos, "-m", model, "--failures", tmp_path / "f.jsonl")
    assert (ended.code, names(ended.rows)) == (3, [b"fits.png"])
    (failure,) = lines(tmp_path / "f.jsonl")
    assert (failure["file_name"], failure["error"]) == ("large.png", "shape")
    assert "40x36" in failure["message"]
    assert "32x32" in failure["message"]


def test_images_that_are_too_large_or_too_slow_are_failures(captioner: Path, tmp_path: Path):
    photos = paint(tmp_path / "photos", "0.png", "1.png")
    Image.new("RGB", (100, 100)).save(photos / "large.png")
    ended = call("caption", photos, "-m", captioner, "--max-pixels", 9_999, "--failures", tmp_path / "f.jsonl")
    assert names(ended.rows) == [b"0.png", b"1.png"]
    assert [row["error"] for row in lines(tmp_path / "f.jsonl")] == ["too-large"]
    assert call("caption", photos, "-m", captioner, "--max-pixels", 10_000).code == 0
    Image.new("RGB", (5000, 5000)).save(tmp_path / "slow.png")
    slow = ["-m", captioner, "--workers", 1, "--decode-timeout", 0.001, "--failures", tmp_path / "slow.jsonl"]
    assert call("caption", tmp_path / "slow.png", *slow).code == 3
    assert [row["error"] for row in lines(tmp_path / "slow.jsonl")] == ["timeout"]


# Files


def test_sidecars_are_skipped_appended_or_overwritten(captioner: Path, photos: Path, tmp_path: Path):
    texts = [row["text"] for row in call("caption", photos, "-m", captioner).rows]

    def beside(folder: Path, suffix: str) -> list[str]:
        paths = [os.fsdecode(os.path.join(os.fsencode(folder), os.fsencode(name))) for name in TREE]
        return [Path(os.path.splitext(path)[0] + suffix).read_text() for path in paths]

    command = ["caption", photos, "-m", captioner, "--sidecar", ".txt"]
    first = call(*command)
    assert (first.code, first.out) == (0, b"")
    assert beside(photos, ".txt") == [f"{text}\n" for text in texts]
    (photos / "a.txt").write_text("mine\n")
    assert "0 captioned, 7 skipped" in call(*command).err
    assert (photos / "a.txt").read_text() == "mine\n"
    for _ in range(2):  # an existing caption is not appended again
        assert call(*command, "--existing", "append").code == 0
        assert beside(photos, ".txt") == [f"mine, {texts[0]}\n", *(f"{text}\n" for text in texts[1:])]
    assert call(*command, "--existing", "overwrite").code == 0
    assert beside(photos, ".txt") == [f"{text}\n" for text in texts]
    mirrored = ["--sidecar", ".caption", "--sidecar-dir", tmp_path / "texts", "-o", tmp_path / "c.jsonl"]
    assert call("caption", photos, "-m", captioner, *mirrored).code == 0
    assert beside(tmp_path / "texts", ".caption") == [f"{text}\n" for text in texts]
    assert [row["text"] for row in lines(tmp_path / "c.jsonl")] == texts


def test_a_dry_run_lists_images_and_writes_nothing(captioner: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    assert call("caption", photos, "-m", captioner, "-o", out, "--limit", 2).code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    ended = call("caption", photos, "-m", "./nosuch", "-o", out, "--dry-run")
    assert ended.code == 0
    assert ended.out.decode().splitlines() == [
        "new\\nline.png",
        "quo'te\".bmp",
        "sub/b.jpg",
        "sub/c d.webp",
        "sub/deep/e.tif",
    ]
    assert ended.err == "5 would be captioned, 2 skipped\n"
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_limit_counts_images_without_a_caption(captioner: Path, photos: Path, tmp_path: Path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    command = ["caption", photos, "-m", captioner, "--batch-size", 4, "-o"]
    assert call(*command, whole).code == 0
    for _ in range(4):
        assert call(*command, parts, "--limit", 2).code == 0
    assert parts.read_bytes() == whole.read_bytes()
    assert call(*command, tmp_path / "none.jsonl", "--limit", 0).code == 0
    assert (tmp_path / "none.jsonl").read_bytes() == b""


def test_overwrite_starts_from_scratch(captioner: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "c.jsonl"
    command = ["caption", photos, "-m", captioner, "-o", out]
    assert call(*command).code == 0
    assert call(*command, "--num-beams", 2, "--overwrite").code == 0
    assert run_file(out)["settings"]["generation"]["num_beams"] == 2
    assert run_file(out)["counts"] == {"captions": 7, "failures": 0}
    assert out.read_bytes() == call("caption", photos, "-m", captioner, "--num-beams", 2).out


def test_a_quiet_run_prints_nothing(captioner: Path, photos: Path, tmp_path: Path):
    (photos / "b.png").write_bytes(b"not an image")
    out = tmp_path / "c.jsonl"
    ended = call("caption", photos, "-m", captioner, "-o", out, "--quiet")
    assert (ended.code, ended.out, ended.err) == (3, b"", "")
    assert len(lines(out)) == 7


def test_options_without_effect_are_reported(captioner: Path, photos: Path):
    idle = call("caption", photos, "-m", captioner, "--temperature", 0.5, "--length-penalty", 2)
    assert idle.code == 0
    assert "--temperature has no effect without --do-sample" in idle.err
    assert "--length-penalty has no effect with one beam" in idle.err


def test_conflicting_lengths_are_reported_and_resolved_like_generate(photos: Path, tmp_path: Path):
    model = save_captioner(tmp_path / "model", generation={"max_new_tokens": 4, "min_new_tokens": 3})
    least = call("caption", photos / "a.png", "-m", model, "--min-new-tokens", 9)
    assert least.code == 0
    assert (
        "--min-new-tokens 9 is more than the model's own max_new_tokens 4: captions are truncated after 4" in least.err
    )
    assert [len(row["text"].split()) for row in least.rows] == [4]
    most = call("caption", photos / "a.png", "-m", model, "--max-new-tokens", 2)
    assert "the model's own min_new_tokens 3 is more than --max-new-tokens 2" in most.err
    assert [len(row["text"].split()) for row in most.rows] == [2]
    change_json(model / "generation_config.json", {"min_new_tokens": 5})
    own = call("caption", photos / "a.png", "-m", model)
    assert own.code == 0
    assert "the model's own min_new_tokens 5 is more than the model's own max_new_tokens 4" in own.err
    assert "is more than" not in call("caption", photos / "a.png", "-m", model, "--max-new-tokens", 5).err


def test_runs_with_sidecars_only_resume_by_the_failure_list(captioner: Path, tmp_path: Path):
    photos = paint(tmp_path / "photos", "a.png")
    (photos / "b.png").write_bytes(b"not an image")
    command = ("caption", photos, "-m", captioner, "--sidecar", ".txt", "--failures", tmp_path / "failures.jsonl")
    assert call(*command).code == 3
    paint(photos, "b.png")
    assert call(*command, "--retry-failed").code == 0
    assert call(*command, "--overwrite").code == 0


def test_several_captions_can_be_a_setting_of_the_checkpoint(photos: Path, tmp_path: Path):
    model = save_captioner(tmp_path / "model", generation={"num_beams": 3, "num_return_sequences": 3})
    rows = [json.loads(line) for line in call("caption", photos, "-m", model).out.splitlines()]
    assert rows
    assert all(len(row["candidates"]) == 3 for row in rows)
    assert b"candidates" not in call("caption", photos, "-m", model, "--num-return-sequences", 1).out


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"num_beams": "4"}, "num_beams is '4'"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"suppress_tokens": [99999]}, "suppressed tokens: token 99999"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_invalid_generation_settings_of_a_checkpoint_are_refused(
    photos: Path, tmp_path: Path, generation: dict[str, Any], message: str
):
    model = save_captioner(tmp_path / "model")
    change_json(model / "generation_config.json", generation)
    ended = call("caption", photos, "-m", model)
    assert ended.code in (1, 2)
    assert message in ended.err
    assert "unexpected" not in ended.err


def test_captions_are_at_most_as_long_as_the_decoder(captioner: Path, photos: Path):
    assert call("caption", photos, "-m", captioner, "--max-new-tokens", 64, "--limit", 1).code == 0
    assert "at most 64" in call("caption", photos, "-m", captioner, "--max-new-tokens", 65, "--limit", 1).err


def test_the_batch_is_at_most_the_number_of_images(captioner: Path, photos: Path, tmp_path: Path):
    command = ["caption", photos, "-m", captioner, "-o", tmp_path / "c.jsonl", "--batch-size", 10**6, "--limit", 2]
    assert call(*command).code == 0
    assert json.loads((tmp_path / "c.run.json").read_text())["shapes"]["slots"] == 2


@pytest.mark.parametrize("quiet", [[], ["--quiet"], ["--dry-run"]])
def test_a_folder_without_images_is_wrong_usage(quiet: list[str], captioner: Path, tmp_path: Path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.CR2").touch()
    ended = call("caption", tmp_path / "raw", "-m", captioner, "-o", tmp_path / "c.jsonl", *quiet)
    assert (ended.code, ended.out) == (2, b"")
    assert f"{tmp_path / 'raw'}: 0 images; 1 .CR2: name them with --include" in ended.err
    assert not (tmp_path / "c.jsonl").exists()


def test_an_empty_list_is_a_run_without_images(captioner: Path):
    ended = call("caption", "-", "-m", captioner)
    assert (ended.code, ended.out) == (0, b"")
    assert "there is no image in standard input" in ended.err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_prepared_copy_is_a_source(workers: int, captioner: Path, tmp_path: Path):
    odd = os.fsdecode(b"\xff.png")
    paint(tmp_path / "photos", "a.png", "b.png", os.fsencode(odd))
    rows = [{"file_name": name, "text": "a caption"} for name in ("a.png", "b.png")]
    encoded = base64.b64encode(os.fsencode(odd)).decode()
    rows.append({"file_name": "odd", "file_name_bytes": encoded, "text": "a caption"})
    (tmp_path / "photos" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    copy, out = tmp_path / "copy", tmp_path / "c.jsonl"
    data = ["--data", tmp_path / "photos" / "captions.jsonl", "--val-fraction", 0.4, "--workers", 0]
    assert call("prepare", *data, "--format", "png", "--out", copy).code == 0
    run = ["caption", copy, "-m", captioner, "-o", out, "--workers", workers]
    assert call(*run, "--fields", "width,format").code == 0
    captions = {name: row["text"] for name, row in zip(names(lines(out)), lines(out), strict=True)}
    assert captions.keys() == {b"a.png", b"b.png", b"\xff.png"}
    assert {(row["width"] > 30, row["format"]) for row in lines(out)} == {(True, "PNG")}
    assert "3 skipped" in call(*run, "--fields", "width,format").err
    direct = call("caption", tmp_path / "photos", "-m", captioner)
    assert captions == {name: row["text"] for name, row in zip(names(direct.rows), direct.rows, strict=True)}
    refused = call("caption", copy, "-m", captioner, "--sidecar", ".txt")
    assert (refused.code, "give --sidecar-dir" in refused.err) == (2, True)
    assert call("caption", copy, "-m", captioner, "--sidecar", ".txt", "--sidecar-dir", tmp_path / "texts").code == 0
    assert (tmp_path / "texts" / "a.txt").read_text().strip() == captions[b"a.png"]


def test_images_of_one_name_in_a_prepared_copy_both_have_rows(captioner: Path, tmp_path: Path):
    given: list[object] = []
    for split in ("train", "val"):
        paint(tmp_path / split, "a.png", seed=len(given))
        (tmp_path / split / "captions.jsonl").write_text('{"file_name": "a.png", "text": "a caption"}\n')
        given += [f"--{split}-data".replace("train-", ""), tmp_path / split / "captions.jsonl"]
    copy, out = tmp_path / "copy", tmp_path / "c.jsonl"
    assert call("prepare", *given, "--out", copy, "--workers", 0).code == 0
    assert call("caption", copy, "-m", captioner, "-o", out).code == 0
    assert [row["file_name"] for row in lines(out)] == ["a.png", "val-0/a.png"]
    change_json(copy / "manifest.json", {"state": "unfinished"})
    ended = call("caption", copy, "-m", captioner, "-o", out)
    assert (ended.code, "run the same capcli prepare command again" in ended.err) == (2, True)


def test_options_named_in_messages_and_docstrings_exist():
    known = {flag for _, option in every_option() for flag in (*option.opts, *option.secondary_opts)}
    known |= {"--help", "--version", "--nproc-per-node"}  # the last is an option of torchrun
    known |= {"--query-gpu", "--force-reinstall", "--upgrade", "--force-download"}  # of nvidia-smi, pip and hf
    folder = Path(capcli.__file__).parent
    for path in folder.rglob("*.py"):
        if path.parent.name == "cli":
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", path.read_text()):
            assert flag in known, f"{path.name}: {flag}"


# The environment


def test_capcli_model_is_the_default_of_every_command_with_a_model(tmp_path: Path):
    env = {"CAPCLI_MODEL": str(tmp_path / "no such model")}
    paint(tmp_path, "a.png")
    (tmp_path / "a.csv").write_text("file_name,caption\na.png,a dog\n")
    train = ("train", "--data", tmp_path / "a.csv", "--out", tmp_path / "run")
    for command in (("caption", tmp_path), ("bench", tmp_path), ("export", "--onnx"), train):
        assert "no such model" in call(*command, env=env).err, command
        assert "another model" in call(*command, "--model", "another model", env=env).err, command
    assert "no such model" not in call(*train, "--encoder", "e", "--decoder", "d", env=env).err


@pytest.mark.parametrize("command", ["caption", "prepare", "export", "bench", "evaluate"])
def test_a_launcher_of_several_processes_is_refused(command: str, tmp_path: Path):
    arguments = {
        "caption": (tmp_path,),
        "bench": (tmp_path,),
        "export": ("--onnx",),
        "prepare": ("--out", tmp_path),
        "evaluate": ("a", "--references", "b"),
    }
    ended = call(command, *arguments.get(command, ()), env={"WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    assert ended.code == 2
    assert f"run capcli {command} without it" in ended.err
    assert "CUDA_VISIBLE_DEVICES" in ended.err
