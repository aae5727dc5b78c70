"""`capcli evaluate`: the oracle, formats, omissions, awkward captions, and errors."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import call, ended, environment, execute, spawn, wait_until
from test_metrics import ORACLE, needs_data, needs_java

MEASURES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
CAPTIONS = {"a.jpg": "a dog runs", "b.jpg": "a man on a horse", "c.jpg": "a red car"}
REFERENCES = """image,caption
a.jpg,A dog is running.
a.jpg,The dog runs on grass
b.jpg,Two men ride horses
b.jpg,A man on a brown horse
c.jpg,"A red car, parked"
"""


def save_rows(path: Path, captions: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"file_name": n, "text": t, "score": -1.0}) + "\n" for n, t in captions.items()))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    references = tmp_path / "captions.txt"
    references.write_text(REFERENCES)
    return save_rows(tmp_path / "captions.jsonl", CAPTIONS), references


def figures(*arguments: object, **options: Any) -> dict[str, Any]:
    done = call("evaluate", *arguments, "--json", **options)
    assert done.code == 0, done.err
    return json.loads(done.out)


@needs_data
@needs_java
def test_the_oracle_through_the_command_beside_a_second_file(tmp_path: Path) -> None:
    oracle = json.loads(ORACLE.read_text())
    candidates, references = oracle["candidates"], tmp_path / "annotations.json"
    layout = {
        "images": [{"id": int(n), "file_name": f"COCO_val2014_{int(n):012d}.jpg"} for n in oracle["references"]],
        "annotations": [
            {"image_id": int(n), "id": i, "caption": text}
            for n, each in oracle["references"].items()
            for i, text in enumerate(each)
        ],
    }
    references.write_text(json.dumps(layout))
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"image_id": int(n), "caption": text} for n, text in candidates.items()]))
    worse = save_rows(
        tmp_path / "worse.jsonl", {f"val/{int(n):012d}.jpg": f"{text} and a cat" for n, text in candidates.items()}
    )
    table = tmp_path / "scores.csv"

    done = execute(
        *("evaluate", results, worse, "--references", references, "--bootstrap", "--resamples", 50, "--json"),
        *("--per-image", table),
    )

    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert {name: found["first"][name] for name in MEASURES} == pytest.approx(oracle["scores"], abs=2e-6)
    assert found["images"] == 126
    for row in csv.DictReader(table.read_text().splitlines()):
        expected = oracle["per_image"][row["file_name"]]
        assert {name: float(row[name]) for name in MEASURES} == pytest.approx(expected, abs=2e-6)
        assert row["text"] == candidates[row["file_name"]]
        change = float(row["second_METEOR"]) - float(row["METEOR"])
        assert float(row["difference_METEOR"]) == pytest.approx(change, abs=2e-6)
    for name in MEASURES:
        low, high = found["first"]["intervals"][name]
        assert low < found["first"][name] < high
        assert found["difference"][name] == found["second"][name] - found["first"][name]
        low, high = found["difference"]["intervals"][name]
        assert low <= found["difference"][name] <= high
    assert found["difference"]["intervals"]["Bleu_4"][1] < 0  # the draws are shared, so the difference is certain


@needs_java
def test_awkward_captions_are_scored_in_the_c_locale(tmp_path: Path) -> None:
    texts = {
        "empty.jpg": "",
        "bars.jpg": "a dog ||| a dog |||",
        "breaks.jpg": "a dog\r\nruns\u2028on\tgrass\x85",
        "emoji.jpg": "🐶 dog ★",
        "café 日本.jpg": "一只狗 café",
        "long.jpg": "the dog " * 400,
        "marks.jpg": "?!...",
    }
    captions = save_rows(tmp_path / "c.jsonl", texts)
    with open(captions, "ab") as file:
        file.write(b'{"file_name": "\xef\xbf\xbd.jpg", "text": "a dog", "file_name_bytes": "/y5qcGc="}\n')
    references = tmp_path / "r.jsonl"
    rows = [{"file_name": name, "text": f"{text[:20]} a dog runs ||| on grass"} for name, text in texts.items()]
    rows.append({"file_name": "x.jpg", "text": "a dog"})
    references.write_text("".join(map("{}\n".format, map(json.dumps, rows))))
    with open(references, "ab") as file:
        file.write(b'{"file_name": "\xef\xbf\xbd.jpg", "text": "a dog", "file_name_bytes": "/y5qcGc="}\n')
    table = tmp_path / "scores.csv"

    done = execute(
        *("evaluate", captions, "--references", references, "--per-image", table, "--json"),
        env={"LC_ALL": "C", "PYTHONUTF8": "0"},
    )

    assert done.code == 0, done.err
    assert json.loads(done.out)["references_without_caption"] == 1
    found = json.loads(done.out)
    assert (found["images"], found["words_min"], found["words_max"]) == (8, 0, 800)
    each = {row["file_name"]: row for row in csv.DictReader(table.read_text("utf-8").splitlines())}
    assert {name: float(each["empty.jpg"][name]) for name in MEASURES} == pytest.approx(dict.fromkeys(MEASURES, 0))
    assert float(each["\ufffd.jpg"]["METEOR"]) == pytest.approx(1)
    assert each["\ufffd.jpg"]["file_name_bytes"] == "/y5qcGc="
    assert float(each["café 日本.jpg"]["METEOR"]) > 0
    assert float(each["bars.jpg"]["METEOR"]) > 0.3


@pytest.mark.parametrize("form", ["jsonl", "csv", "results", "stdin", "by name"])
def test_captions_in_every_format_give_the_same_figures(files: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    rows, references = files
    expected = figures(rows, "--references", references, "--without-java")
    assert 0 < expected["Bleu_1"] < 1
    path: object = rows
    if form == "csv":
        path = tmp_path / "c.csv"
        path.write_text("file_name,text,score\n" + "".join(f"{n},{t},-1\n" for n, t in CAPTIONS.items()))
    elif form == "results":
        path = tmp_path / "c.json"
        path.write_text(json.dumps([{"image_id": i, "caption": t} for i, t in enumerate(CAPTIONS.values(), 7)]))
        annotations = [line.partition(",") for line in REFERENCES.splitlines()[1:]]
        numbers = {name: number for number, name in enumerate(CAPTIONS, 7)}
        references = tmp_path / "annotations.json"
        images = [{"id": number, "file_name": name} for name, number in numbers.items()]
        annotated = [{"image_id": numbers[name], "caption": text.strip('"')} for name, _, text in annotations]
        references.write_text(json.dumps({"images": images, "annotations": annotated}))
    elif form == "by name":
        path = tmp_path / "c.json"
        path.write_text(json.dumps(CAPTIONS))
    elif form == "stdin":
        path = "-"
    found = figures(path, "--references", references, "--without-java", stdin=rows.read_bytes())
    assert {name: found[name] for name in found if name != "captions"} == {
        name: expected[name] for name in expected if name != "captions"
    }


def test_images_left_out_are_counted_and_reported(files: tuple[Path, Path], tmp_path: Path) -> None:
    _, references = files
    captions = save_rows(tmp_path / "c.jsonl", {"other/a.jpg": "a dog", "b.jpg": "", "new.jpg": "a cat"})
    done = call("evaluate", captions, "--references", references, "--without-java", "--json")
    found = json.loads(done.out)
    assert (found["images"], found["captions_without_references"], found["references_without_caption"]) == (2, 1, 1)
    assert (found["words_min"], found["words_mean"]) == (0, 1)
    assert done.err == ""  # the captions of a part of the images are no fault
    table = call("evaluate", captions, "--references", references, "--without-java", env={"COLUMNS": "200"})
    assert table.err == ""
    assert (
        "left out 1 image with references and no caption, 1 image with a caption and no references"
        in table.out.decode()
    )
    failure = {"file_name": "c.jpg", "error": "unreadable", "message": "truncated"}
    (tmp_path / "c.failures.jsonl").write_text(json.dumps(failure) + "\n")
    done = call("evaluate", captions, "--references", references, "--without-java", "--json")
    assert (
        "c.jsonl: images with references that could not be captioned: 1 (left out; the scores are too high" in done.err
    )
    assert json.loads(done.out)["failed"] == 1


def test_any_number_of_files_is_compared_in_one_table(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows, references = files
    second = save_rows(tmp_path / "second.jsonl", {"c.jpg": "a red car", "a.jpg": "the dog runs on grass"})
    third = save_rows(tmp_path / "third.jsonl", {"a.jpg": "a horse", "b.jpg": "two men", "c.jpg": "a red car , parked"})
    three = ("evaluate", rows, second, third, "--references", references, "--without-java", "--bootstrap")
    done = call(*three, "--resamples", 20, "--json", "--per-image", tmp_path / "each.csv")
    assert done.code == 0, done.err
    assert done.err.count("because not all files have a caption of them: 1") == 2
    found = json.loads(done.out)
    alone = figures(rows, third, "--references", references, "--without-java")
    assert found["images"] == 2 < alone["images"]
    assert [Path(each["captions"]).name for each in found["files"]] == ["captions.jsonl", "second.jsonl", "third.jsonl"]
    for file, difference in zip(found["files"][1:], found["differences"], strict=True):
        assert difference["CIDEr"] == file["CIDEr"] - found["files"][0]["CIDEr"]
        assert set(difference["intervals"]) == set(file["intervals"])
    with open(tmp_path / "each.csv", newline="") as csv_file:
        each = list(csv.DictReader(csv_file))
    assert [row["3_text"] for row in each] == ["a horse", "a red car , parked"]
    for row in each:
        assert float(row["3_difference_CIDEr"]) == pytest.approx(float(row["3_CIDEr"]) - float(row["CIDEr"]), abs=2e-6)
    table = call(*three, env={"COLUMNS": "300"}).out.decode()
    assert all(name in table for name in ("captions.jsonl", "second.jsonl", "third.jsonl"))
    assert "difference" not in table


def test_references_of_several_files_are_combined(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows, references = files
    more = save_rows(tmp_path / "more.jsonl", CAPTIONS)
    assert figures(rows, "--references", references, "--without-java")["Bleu_4"] < 0.9
    both = figures(rows, "--references", references, "--references", more, "--without-java")
    assert both["Bleu_1"] == pytest.approx(1)


def test_references_of_one_split(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows, _ = files
    references = tmp_path / "r.csv"
    references.write_text("image,caption,split\na.jpg,a dog runs,train\nb.jpg,a man,val\nc.jpg,a car,test\n")
    found = figures(rows, "--references", references, "--without-java", "--split", "val")
    assert (found["images"], found["captions_without_references"]) == (1, 2)
    references.write_text("image,caption,split\na.jpg,a dog runs,train\n")
    done = call("evaluate", rows, "--references", references, "--without-java", "--split", "val")
    assert done.code == 2
    assert "no image is in the split val; there are: train" in done.err


def test_two_files_are_compared_on_their_common_images(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows, references = files
    second = save_rows(tmp_path / "second.jsonl", {"c.jpg": "a red car", "a.jpg": "the dog runs on grass"})
    done = call("evaluate", rows, second, "--references", references, "--without-java", "--json")
    assert "images left out because the other file has no caption of them: 1" in done.err
    found = json.loads(done.out)
    assert found["images"] == 2
    assert found["difference"]["Bleu_2"] == found["second"]["Bleu_2"] - found["first"]["Bleu_2"] > 0
    assert found["difference"]["words_mean"] == 1


def test_chinese_is_compared_by_characters(tmp_path: Path) -> None:
    captions = save_rows(tmp_path / "c.jsonl", {"1.jpg": "一 个 人 在 跑", "2.jpg": "两只狗"})
    references = tmp_path / "r.txt"
    references.write_text("1.jpg#zhc#0 一个男人在跑。\n2.jpg#zhc#0 两只狗在草地上。\n")
    done = call("evaluate", captions, "--references", references, "--without-java", "--json")
    found = json.loads(done.out)
    assert "characters are compared" in done.err
    assert (found["words_mean"], found["tokenizer"]) == (4, "characters")
    assert found["Bleu_1"] > 0.5
    assert figures(captions, "--references", references, "--without-java", "--tokenize", "ptb")["Bleu_1"] < 0.1


def test_one_image_is_written_in_the_singular(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("image,caption\na.jpg,a dog runs\n")
    rows = save_rows(tmp_path / "c.jsonl", {"a.jpg": "a dog runs"})
    done = call("evaluate", rows, "--references", tmp_path / "r.csv", "--without-java")
    assert "1 image, tokens: " in done.out.decode()


def test_the_table_and_its_intervals_depend_only_on_the_seed(files: tuple[Path, Path]) -> None:
    rows, references = files
    arguments = ("evaluate", rows, "--references", references, "--without-java", "--bootstrap", "--resamples", 50)
    done = call(*arguments, env={"COLUMNS": "120"})
    text = done.out.decode()
    assert (done.code, done.err) == (0, "")
    assert "BLEU-4" in text
    assert "3 images" in text
    assert "50 resamples" in text
    assert "METEOR" not in text
    assert call(*arguments, env={"COLUMNS": "120"}).out == done.out
    assert call(*arguments, "--seed", 1, env={"COLUMNS": "120"}).out != done.out


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"captions": ""}, 1, "is empty"),
        (
            {"captions": '{"file_name": "z.jpg", "text": "a"}\n'},
            1,
            "its names are like z.jpg, the references' like a.jpg",
        ),
        (
            {"captions": '{"file_name": "a.jpg", "text": "a"}\n{"file_name": "a.jpg", "text": "b"}\n'},
            1,
            "two captions of a.jpg",
        ),
        ({"captions": '{"file_name": "a.jpg", "text": "a"}\n{"file_na'}, 1, "captions.jsonl: line 2"),
        ({"references": "image,caption\na.jpg,\n"}, 1, "captions.txt"),
        ({"references": "caption,image\nx,a.jpg\na dog, brown,b.jpg\n"}, 1, "captions.txt: line 3 has 3 cells"),
        ({"captions": '{"file_name": "a.jpg", "text": "x"}\n{"file_name"\n'}, 1, "captions.jsonl: line 2, column"),
        ({"more": ["--references", "nowhere.json"]}, 2, "nowhere.json: no such file"),
        ({"more": ["--per-image", "nowhere/x.csv"]}, 2, "--per-image nowhere/x.csv"),
        ({"more": ["--per-image", os.devnull]}, 2, "is not a regular file"),
        ({"more": ["-", "-"]}, 2, "'-' was given twice"),
    ],
)
def test_errors_say_what_to_do(files: tuple[Path, Path], change: dict[str, Any], code: int, message: str) -> None:
    rows, references = files
    for path, name in ((rows, "captions"), (references, "references")):
        if name in change:
            path.write_text(change[name])
    done = call("evaluate", rows, "--references", references, "--without-java", *change.get("more", ()))
    assert (done.code, done.out) == (code, b"")
    assert message in done.err
    assert "Traceback" not in done.err


def test_an_input_is_not_overwritten(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows, references = files
    link = tmp_path / "scores.csv"
    link.symlink_to(references)
    done = call("evaluate", rows, "--references", references, "--without-java", "--per-image", link)
    assert done.code == 2
    assert "would be overwritten" in done.err
    assert references.read_text() == REFERENCES


def test_without_java_there_is_one_error_that_names_without_java(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows, references = files
    nothing = {"PATH": str(tmp_path), "JAVA_HOME": ""}
    done = execute("evaluate", rows, "--references", references, env=nothing)
    assert (done.code, done.out) == (1, b"")
    assert done.err.count("\n") == 1
    for words in ("Java", "apt-get install default-jre-headless", "brew install openjdk", "--without-java"):
        assert words in done.err
    done = execute("evaluate", rows, "--references", references, "--without-java", "--json", env=nothing)
    assert (done.code, done.err) == (0, "")
    assert {"Bleu_4", "ROUGE_L", "CIDEr"} < set(json.loads(done.out))
    assert "METEOR" not in json.loads(done.out)


def test_the_error_of_a_broken_java_is_shown(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows, references = files
    stub = tmp_path / "bin" / "java"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 'Error: no runtime present' >&2\nexit 1\n")
    stub.chmod(0o755)
    done = execute("evaluate", rows, "--references", references, env={"PATH": f"{stub.parent}:{os.environ['PATH']}"})
    assert (done.code, done.out) == (1, b"")
    assert "no runtime present" in done.err
    assert "--without-java" in done.err


def test_without_pycocoevalcap_the_error_names_the_extra(files: tuple[Path, Path]) -> None:
    rows, references = files
    program = (
        "import sys; sys.modules['pycocoevalcap'] = None; from capcli.cli import main\n"
        "sys.argv = ['capcli', 'evaluate', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", program, str(rows), "--references", str(references)]
    done = subprocess.run(command, capture_output=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"pip install 'capcli[metrics]'" in done.stderr
    assert done.stderr.count(b"\n") == 1


@needs_java
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks for the process in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_java_as_well(files: tuple[Path, Path], number: int, code: int) -> None:
    rows, references = files
    process = spawn("evaluate", rows, "--references", references)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    meteor: list[str] = []

    def started() -> bool:
        meteor[:] = [child for child in children.read_text().split() if b"meteor" in cmdline(child)]
        return bool(meteor)

    wait_until(started, process)
    os.kill(process.pid, number)  # this process only; a terminal would signal Java too
    done = ended(process)
    assert done.code == code, done.err
    assert not any(b"meteor" in cmdline(child) for child in meteor)


def cmdline(process: str) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def test_its_help_imports_nothing_heavy() -> None:
    program = "import sys; sys.argv = ['capcli', 'evaluate', '--help']\nfrom capcli.cli import main\n"
    program += "try: main()\nexcept SystemExit: print([m for m in ('numpy', 'pycocoevalcap', 'rich.table') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment(), check=True)
    assert done.stdout.endswith(b"[]\n")


@pytest.mark.parametrize("where", ["captions", "references", "both"])
def test_named_columns_apply_to_the_files_that_have_them(where: str, tmp_path: Path) -> None:
    image, caption = "image name", "reference text"
    usual, other = "image,caption", f"{image},{caption}"
    references = tmp_path / "references.csv"
    references.write_text(REFERENCES.replace(usual, usual if where == "captions" else other))
    captions = tmp_path / "captions.csv"
    head = usual if where == "references" else other
    captions.write_text("\n".join([head, *(f"{name},{text}" for name, text in CAPTIONS.items())]))
    given = ("--references", references, "--without-java", "--image-column", image, "--caption-column", caption)
    assert figures(captions, *given)["CIDEr"] > 0


def test_a_column_that_no_file_has_is_an_error(files: tuple[Path, Path]) -> None:
    captions, references = files
    given = ("--references", references, "--without-java", "--caption-column", "nothing")
    done = call("evaluate", captions, *given)
    assert done.code == 2
    assert "has no column 'nothing'" in done.err


def test_the_advice_of_an_error_message_works(files: tuple[Path, Path], tmp_path: Path) -> None:
    captions = tmp_path / "odd.csv"
    captions.write_text("\n".join(["image,prediction", *(f"{name},{text}" for name, text in CAPTIONS.items())]))
    given = (captions, "--references", files[1], "--without-java")
    assert "give it with --caption-column" in call("evaluate", *given).err
    assert call("evaluate", *given, "--caption-column", "prediction").code == 0
