"""`capcli caption --endpoint`: an OpenAI-compatible server on this machine, with the faults that servers have."""

from __future__ import annotations

import email.utils
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import Asked, ChatServer, completion, image_of, save_numbered, scored, serving
from PIL import Image
from running import Ended, call, ended, execute, spawn, wait_until

from capcli.captioning.chat.completions import Completion
from capcli.captioning.chat.request import RequestTemplate
from capcli.captioning.chat.schedule import ImageRequest, Schedule, Usage
from capcli.captioning.chat.servers import Server, Servers
from capcli.errors import UnfinishedError
from capcli.options import EndpointOptions
from capcli.records import Loaded

KEY = "sk-secret-0123456789"
REFUSAL = "I'm sorry, but I can't help with that."


def arguments(server: ChatServer | str, photos: Path, out: Path, *more: object) -> tuple[object, ...]:
    url = server if isinstance(server, str) else server.url
    return ("caption", photos, "--endpoint", url, "--model", "vlm", "--out", out, "--workers", 0, *more)


def caption(server: ChatServer | str, photos: Path, out: Path, *more: object, **options: Any) -> Ended:
    return call(*arguments(server, photos, out, *more), **options)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def failures(out: Path) -> dict[str, str]:
    """The kinds of the failures, by name."""
    return {row["file_name"]: row["error"] for row in rows(out.with_suffix(".failures.jsonl"))}


def run_file(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.with_suffix(".run.json").read_text())
    return found


def unused_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPCLI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_a_request_has_the_upright_image_the_prompts_and_the_options_by_their_names(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "captions.jsonl"
    photos.mkdir()
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    Image.new("RGB", (60, 30), (200, 40, 90)).save(photos / "a.jpg", exif=exif)
    Image.new("RGB", (300, 120), "white").save(photos / "b.png")
    options = ("--prompt", "What is {{it}}?", "--system", "Be brief.", "--max-new-tokens", 9, "--temperature", 0.5)
    options += ("--top-p", 0.9, "--seed", 3, "--max-image-edge", 100)
    with serving() as server:
        done = caption(server, photos, out, *options, env={"CAPCLI_API_KEY": KEY, "OPENAI_API_KEY": "another"})
    assert (done.code, [row["text"] for row in rows(out)], rows(out)[0]["score"]) == (
        0,
        ["caption 3109", "caption 4095"],
        None,
    )
    assert done.err.count("score is null") == 1
    first, second = sorted(server.bodies, key=lambda body: image_of(body).size)
    assert [image_of(body).size for body in (first, second)] == [(30, 60), (100, 40)]
    system, user = first.pop("messages")
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"][1] == {"type": "text", "text": "What is {it}?"}
    sampling = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert first == {"model": "vlm", "stream": False, "logprobs": True, **sampling}
    assert (server.keys, server.paths) == ({f"Bearer {KEY}"}, {"/v1/chat/completions"})
    recorded = run_file(out)
    wanted = {
        "endpoint": ["/v1"],
        "model": "vlm",
        "prompt": "What is {{it}}?",
        "system": "Be brief.",
        "max_image_edge": 100,
    }
    assert recorded["settings"].items() >= {**wanted, "schema": None, "generation": sampling}.items()
    assert recorded["usage"].pop("seconds") > 0
    assert recorded["usage"] == {"requests": 2, "prompt_tokens": 20, "completion_tokens": 6}
    assert recorded["endpoint"] == {"urls": [server.url]}
    assert KEY not in done.err
    assert not [path for path in tmp_path.glob("captions*") if KEY.encode() in path.read_bytes()]


def refuse_once(asked: Asked, status: int, after: str) -> None:
    if asked.time == 1:
        asked.json(status, {"error": {"message": "too many requests"}}, {"Retry-After": after})
    else:
        asked.caption()


def wait_and_caption(asked: Asked) -> None:
    time.sleep(3)
    asked.caption()


FAULTS: dict[int, tuple[Callable[[Asked], None], str | None, int]] = {  # what happens, the failure, the requests
    1: (lambda asked: asked.json(500, {}) if asked.time < 3 else asked.caption(), None, 3),
    2: (lambda asked: asked.drop() if asked.time < 2 else asked.caption(), None, 2),
    3: (lambda asked: refuse_once(asked, 429, "1"), None, 2),
    4: (lambda asked: refuse_once(asked, 503, email.utils.formatdate(time.time() + 1, usegmt=True)), None, 2),
    5: (lambda asked: asked.json(400, {"error": {"message": "bad image"}}), "http-400", 1),
    6: (lambda asked: asked.json(413, {}), "http-413", 1),
    7: (lambda asked: asked.caption(REFUSAL), "refusal", 1),
    8: (lambda asked: asked.caption("", message={"content": None, "refusal": "No."}), "refusal", 1),
    9: (lambda asked: asked.caption("A man", finish_reason="content_filter"), "refusal", 1),
    10: (lambda asked: asked.caption(""), "empty-answer", 1),
    11: (lambda asked: asked.caption("", message={"content": None}), "empty-answer", 1),
    12: (lambda asked: asked.caption("A dog that", finish_reason="length"), "cut-answer", 1),
    13: (lambda asked: asked.send(200, b"<html>"), "malformed-answer", 1),
    14: (lambda asked: asked.json(200, {"choices": []}), "malformed-answer", 1),
    15: (lambda asked: asked.caption(["a"]), "malformed-answer", 1),
    16: (lambda asked: asked.json(500, {"detail": "broken"}), "http-500", 3),
    17: (wait_and_caption, "timeout", 3),
    18: (lambda asked: asked.send(200, b'{"choi', {"Content-Length": "400"}) or asked.drop(), "connection", 3),
    19: (lambda asked: asked.caption("word " * 30), None, 1),
    20: (lambda asked: asked.caption("A dog<|im_end|>"), None, 1),
}


def test_every_fault_of_an_answer_is_repeated_or_a_failure_of_its_own_kind(tmp_path: Path) -> None:
    def answer(asked: Asked) -> None:
        FAULTS.get(asked.number, (Asked.caption,))[0](asked)

    photos, out = save_numbered(tmp_path / "photos", 24), tmp_path / "captions.jsonl"
    with serving(answer) as server:
        done = caption(server, photos, out, "--retries", 2, "--request-timeout", 1)
        again = caption(server, photos, out, "--retries", 2)
        kept = tmp_path / "kept.jsonl"
        bad = [f"{number:04}.png" for number in (7, 8, 9, 10, 12)]
        flags = [flag for name in bad for flag in ("--include", name)]
        caption(server, photos, kept, "--on-bad", "keep", *flags)
        strict = tmp_path / "strict.jsonl"
        caption(server, photos, strict, "--on-bad", "fail", "--include", "0019.png", "--include", "002*.png")
    assert (done.code, again.code) == (3, 3), done.err
    assert failures(out) == {f"{number:04}.png": kind for number, (_, kind, _) in FAULTS.items() if kind}
    fine = [number for number in range(24) if FAULTS.get(number, (None, None))[1] is None]
    assert [row["file_name"] for row in rows(out)] == [f"{number:04}.png" for number in fine]
    assert rows(out)[-4]["text"] == "A dog"
    once = {number: FAULTS[number][2] for number in FAULTS if number not in (7, 8, 9, 10, 12, 19, 20)}
    assert {number: server.hits[number] for number in once} == once
    assert [row["text"] for row in rows(kept)] == [REFUSAL, "No.", "A man", "", "A dog that"]
    assert failures(strict) == {"0019.png": "loop", "0020.png": "special-token"}
    messages = {row["file_name"]: row["message"] for row in rows(out.with_suffix(".failures.jsonl"))}
    assert messages["0005.png"] == "HTTP 400: bad image"
    assert "broken (3 attempts)" in messages["0016.png"]


def test_the_score_is_the_mean_log_probability_and_the_best_caption_is_the_first(tmp_path: Path) -> None:
    def answer(asked: Asked) -> None:
        if asked.number == 1:
            tokens = ("<think>", "x", "</think>", "A", " dog")
            logprobs = scored(-9, -9, -9, -1, -2, tokens=tokens)
            asked.caption("<think>x</think>A dog", logprobs=logprobs)
            return
        body = completion("worse", logprobs=scored(-2, -4))
        body["choices"] += completion("better", logprobs=scored(-1, -0.5))["choices"]
        asked.json(200, body)

    photos, out = save_numbered(tmp_path / "photos", 2), tmp_path / "captions.jsonl"
    with serving(answer) as server:
        done = caption(server, photos, out, "--num-return-sequences", 2)
    assert server.bodies[0]["n"] == 2
    assert [row["score"] for row in rows(out)] == [-0.75, -1.5]
    assert [found["text"] for found in rows(out)[0]["candidates"]] == ["better", "worse"]
    assert "fewer captions than --num-return-sequences 2" in done.err
    assert "score is null" not in done.err


def test_a_server_that_refuses_log_probabilities_gets_no_more_requests_for_them(tmp_path: Path) -> None:
    def answer(asked: Asked) -> None:
        if "logprobs" in asked.body:
            asked.json(400, {"error": {"message": "logprobs are not supported"}})
        else:
            asked.caption()

    photos, out = save_numbered(tmp_path / "photos", 20), tmp_path / "captions.jsonl"
    with serving(answer) as server:
        assert caption(server, photos, out, "--retries", 0, "--concurrency", 2).code == 0
    assert sum("logprobs" in body for body in server.bodies) <= 2


def test_a_refusal_of_log_probabilities_is_none_of_the_key(tmp_path: Path) -> None:
    def answer(asked: Asked) -> None:
        if "logprobs" in asked.body:
            asked.json(403, {"error": {"message": "You are not allowed to request logprobs from this model"}})
        else:
            asked.caption()

    with serving(answer) as server:
        done = caption(server, save_numbered(tmp_path / "photos", 6), tmp_path / "captions.jsonl")
    assert (done.code, len(rows(tmp_path / "captions.jsonl"))) == (0, 6), done.err


def test_answers_behind_an_image_that_is_given_up_are_kept(tmp_path: Path) -> None:
    """The first image fails again and again; at the bound the rows of all others are there, and none is asked again."""
    photos, out = save_numbered(tmp_path / "photos", 20), tmp_path / "captions.jsonl"
    first = min(photos.iterdir()).name

    def answer(asked: Asked) -> None:
        asked.json(500, {}) if asked.number == number else asked.caption()

    number = int("".join(c for c in first if c.isdigit()) or 0)
    with serving(answer) as server:
        done = caption(server, photos, out, "--max-requests", 15, "--concurrency", 2)
    assert done.code == 4, done.err
    assert len(rows(out)) >= 8
    assert run_file(out)["usage"]["requests"] == len(server.bodies)
    left = 20 - len(rows(out))
    with serving() as healthy:
        assert caption(healthy, photos, out).code == 0
        assert len(healthy.bodies) == left
    names = [row["file_name"] for row in rows(out)]
    assert sorted(names) == sorted(path.name for path in photos.iterdir())


def test_an_address_that_answers_no_chat_completions_stops_the_run(tmp_path: Path) -> None:
    with serving(lambda asked: asked.send(200, b"<html>Welcome</html>")) as server:
        done = caption(server, save_numbered(tmp_path / "photos", 40), tmp_path / "captions.jsonl")
    assert (done.code, "answered none of the last 10 images" in done.err) == (1, True), done.err
    assert len(failures(tmp_path / "captions.jsonl")) < 40


def test_a_key_that_a_server_repeats_is_hidden(tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"

    def answer(asked: Asked) -> None:
        asked.send(200, json.dumps({"headers": {"Authorization": f"Bearer {KEY}"}}).encode())

    with serving(answer) as server:
        done = caption(server, save_numbered(tmp_path / "photos", 2), out, env={"CAPCLI_API_KEY": KEY})
    assert done.code == 3, done.err
    assert set(failures(out).values()) == {"malformed-answer"}
    assert KEY not in done.err + out.with_suffix(".failures.jsonl").read_text()


def test_answers_follow_the_schema_or_are_failures(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": {"caption": {"type": "string"}}, "required": ["caption"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    texts = ['{"caption": "a\\nb"}', '```json\n{"caption": "c"}\n```', '{"text": "d"}', "e"]
    photos, out = save_numbered(tmp_path / "photos", 4), tmp_path / "captions.jsonl"
    with serving(lambda asked: asked.caption(texts[asked.number])) as server:
        caption(server, photos, out, "--schema", tmp_path / "schema.json")
        (tmp_path / "schema.json").write_text('{"type": "string"}')
        other = caption(server, photos, out, "--schema", tmp_path / "schema.json")
        (tmp_path / "schema.json").write_text('{"type": "no type"}')
        wrong = caption(server, photos, tmp_path / "new.jsonl", "--schema", tmp_path / "schema.json")
    wanted = {"type": "json_schema", "json_schema": {"name": "caption", "strict": True, "schema": schema}}
    assert server.bodies[0]["response_format"] == wanted
    assert [row["text"] for row in rows(out)] == ['{"caption": "a\\nb"}', '{"caption": "c"}']
    assert failures(out) == {"0002.png": "schema", "0003.png": "schema"}
    assert other.code == 2
    assert "schema was" in other.err
    assert wrong.code == 2
    assert "is no JSON schema" in wrong.err
    assert len(server.bodies) == 4


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (401, f"wrong key {KEY}", "does not accept the key in CAPCLI_API_KEY: HTTP 401: wrong key [key]"),
        (403, "no access", "does not accept the key in CAPCLI_API_KEY"),
        (404, "nothing here", "answers no chat completions"),
        (404, "The model `vlm` does not exist.", "has no model vlm"),
        (400, "model vlm not found", "has no model vlm"),
        (402, "pay first", "no credit left"),
        (307, "", "redirects to"),
    ],
)
def test_an_error_of_every_request_stops_the_run_in_one_sentence(
    tmp_path: Path, status: int, message: str, expected: str
) -> None:
    photos, out = save_numbered(tmp_path / "photos", 30), tmp_path / "captions.jsonl"
    with serving(lambda asked: asked.json(status, {"error": {"message": message}}, {"Location": "/v2"})) as server:
        done = caption(server, photos, out, env={"CAPCLI_API_KEY": KEY})
    assert done.code == 1
    assert expected in done.err
    assert KEY not in done.err
    assert len(done.err.splitlines()) == 1
    assert len(server.bodies) <= 4
    assert (rows(out), failures(out)) == ([], {})


def test_an_image_whose_request_is_cancelled_before_it_begins_has_an_outcome() -> None:
    class Refusing:
        """Submits the second image just before the first one stops the run: its request is created and cancelled at once."""

        async def complete(self, *_: object, **__: object) -> Completion:
            schedule.submit(second)
            raise UnfinishedError("no")

        async def close(self) -> None:
            pass

    first, second = (ImageRequest(n, Loaded(str(n), np.zeros(3, np.uint8)), "") for n in range(2))
    url = "http://127.0.0.1:9/v1"
    template = RequestTemplate("vlm", None, {})
    with Schedule(EndpointOptions((url,)), Refusing(), Servers([Server(url, 2)]), template, Usage()) as schedule:
        schedule.submit(first)
        found = {schedule.outcomes.get(timeout=10)[0].index for _ in range(2)}
    assert found == {0, 1}
    assert str(schedule.stopped) == "no"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--num-beams", 4, "--top-k", 3), "--num-beams, --top-k: a server does not take this"),
        (("--no-do-sample", "--temperature", 1), "contradict each other"),
        (("--keep-prompt", "--dtype", "float32"), "--dtype, --keep-prompt: with --endpoint the server decides"),
        (("--prompt", 'as {"caption": 1}'), "write {{ and }} for braces"),
        (("--prompt", "a } b"), "write {{ and }} for braces"),
        (("--schema", "missing.json"), "missing.json"),
        (("--endpoint", "http://192.0.2.1/v1"), "or --insecure"),
        (("--endpoint", "https://me:secret@127.0.0.1/v1"), "set CAPCLI_API_KEY instead"),
        (("--endpoint", "localhost:8000"), "must be an http or https address"),
        (("--endpoint", "https://localhost/v1?key=1"), "has a query"),
        (("--concurrency", 0), "--concurrency"),
    ],
)
def test_wrong_usage_is_refused_before_any_request(tmp_path: Path, flags: tuple[object, ...], expected: str) -> None:
    photos, out = save_numbered(tmp_path / "photos", 1), tmp_path / "captions.jsonl"
    with serving() as server:
        done = caption(server, photos, out, *flags)
        assert caption(server, photos, out, "--dry-run").out == b"0000.png\n"
    assert done.code == 2 or "jsonschema" in done.err
    assert expected in done.err or "jsonschema" in done.err
    assert "secret" not in done.err
    assert server.bodies == []


def test_options_of_a_server_need_one_and_a_server_needs_a_model(tmp_path: Path) -> None:
    assert "no effect without --endpoint" in call("caption", tmp_path, "--max-requests", 3).err
    assert "--endpoint needs --model" in call("caption", tmp_path, "--endpoint", "http://localhost/v1").err


def test_fields_of_a_prompt_come_from_the_metadata_beside_the_images(tmp_path: Path) -> None:
    photos, out = save_numbered(tmp_path / "photos", 4), tmp_path / "captions.jsonl"
    metadata = [
        {"file_name": "0000.png", "tags": ["dog", "beach"], "text": "a dog", "year": 1999},
        {"file_name": "0001.png", "tags": "cat {x}", "text": "a cat", "year": 2001},
        {"file_name": "0002.png", "text": "no tags", "year": 2002},
    ]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metadata))
    with serving() as server:
        done = caption(server, photos, out, "--prompt", "{year}: {tags} ({caption}) {{}}", "--concurrency", 1)
    assert done.code == 3
    assert [body["messages"][0]["content"][1]["text"] for body in server.bodies] == [
        "1999: dog, beach (a dog) {}",
        "2001: cat {x} (a cat) {}",
    ]
    assert failures(out) == {"0002.png": "missing-field", "0003.png": "missing-field"}


def test_requests_at_a_time_grow_with_answers_up_to_the_limit_and_shrink_on_429(tmp_path: Path) -> None:
    def slow(asked: Asked) -> None:
        time.sleep(0.05)
        asked.caption()

    photos = save_numbered(tmp_path / "photos", 60)
    with serving(slow) as server:
        assert caption(server, photos, tmp_path / "a.jsonl", "--concurrency", 3).code == 0
        assert server.busiest == 3
        assert caption(server, photos, tmp_path / "b.jsonl").code == 0
        assert server.busiest > 4

    def few(asked: Asked) -> None:
        if server.busy > 2:
            asked.json(429, {}, {"Retry-After": "0"})
        else:
            slow(asked)

    with serving(few) as server:
        done = caption(server, photos, tmp_path / "c.jsonl", "--concurrency", 8, "--retries", 20, "--limit", 24)
        assert (done.code, len(rows(tmp_path / "c.jsonl"))) == (0, 24)
        assert server.hits.total() < 24 * 2


def test_a_bound_on_requests_or_tokens_stops_the_run_and_the_same_command_continues_it(tmp_path: Path) -> None:
    photos, out = save_numbered(tmp_path / "photos", 10), tmp_path / "captions.jsonl"
    with serving() as server:
        first = caption(server, photos, out, "--max-requests", 4)
        assert (first.code, server.hits.total(), len(rows(out))) == (4, 4, 4)
        assert run_file(out)["state"] == "interrupted"
        second = caption(server, photos, out, "--max-tokens-total", 20, "--concurrency", 1)
        assert (second.code, server.hits.total()) == (4, 6)
        third = caption(server, photos, out, "--max-requests", 4)
    assert "--max-requests 4 is reached; the same command continues the run" in first.err
    assert third.code == 0
    assert [row["text"] for row in rows(out)] == [f"caption {number}" for number in range(10)]
    assert run_file(out)["usage"]["requests"] == server.hits.total() == 10


def test_a_server_that_is_gone_stops_the_run_which_continues_on_another_port(tmp_path: Path) -> None:
    photos, out = save_numbered(tmp_path / "photos", 40), tmp_path / "captions.jsonl"
    gone = threading.Event()

    def answer(asked: Asked) -> None:
        if asked.number == 20:
            gone.set()
            server.socket.close()
        if gone.is_set():
            asked.drop()
        else:
            asked.send(200, json.dumps(completion(f"caption {asked.number}")).encode(), {"Connection": "close"})

    with serving(answer) as server:
        done = caption(server, photos, out, "--retries", 3, "--concurrency", 2)
    assert done.code == 1
    assert "cannot be reached: Connection refused; the same command continues the run" in done.err
    assert 10 <= len(rows(out)) < 40
    assert run_file(out)["state"] == "interrupted"
    assert failures(out) == {}
    with serving() as other:
        assert caption(other, photos, out, "--prompt", "another").code == 2
        assert caption(other, photos, out).code == 0
    assert [row["text"] for row in rows(out)] == [f"caption {number}" for number in range(40)]


def test_a_server_that_only_fails_stops_the_run(tmp_path: Path) -> None:
    photos, out = save_numbered(tmp_path / "photos", 60), tmp_path / "captions.jsonl"
    with serving(lambda asked: asked.json(502, {})) as server:
        done = caption(server, photos, out, "--retries", 1)
    assert done.code == 1
    assert "answered none of the last 10 images" in done.err
    assert server.hits.total() < 50
    assert max(server.hits.values()) <= 2


def test_one_broken_server_of_several_is_left_out(tmp_path: Path) -> None:
    photos, out = save_numbered(tmp_path / "photos", 40), tmp_path / "captions.jsonl"
    with serving(lambda asked: asked.json(500, {})) as broken, serving() as first, serving() as second:
        more = [flag for url in (unused_address(), broken.url, second.url) for flag in ("--endpoint", url)]
        done = caption(first, photos, out, *more, "--retries", 4)
    assert done.code == 0, done.err
    assert len(rows(out)) == 40
    assert broken.hits.total() < 12
    assert min(first.hits.total(), second.hits.total()) > 3


def killed_twice(command: tuple[object, ...], out: Path, at: tuple[int, int]) -> Ended:
    """Run a command, which is killed twice once `out` has so many rows, to its end."""
    for count in at:
        process = spawn(*command)
        wait_until(lambda count=count: out.exists() and out.read_bytes().count(b"\n") >= count, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return execute(*command)


def answer_slowly(asked: Asked) -> None:
    time.sleep(0.02)
    if asked.number % 7 == 3 and asked.time == 1:
        asked.json(503, {})
    else:
        asked.caption()


@pytest.mark.slow
def test_killed_twice_and_interrupted_each_image_has_one_row(tmp_path: Path) -> None:
    photos, out = save_numbered(tmp_path / "photos", 120), tmp_path / "captions.jsonl"
    with serving(answer_slowly) as server:
        command = arguments(server, photos, out, "--concurrency", 4)
        process = spawn(*command)
        wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 10, process)
        process.send_signal(signal.SIGINT)
        stopped = ended(process)
        assert stopped.code == 130, stopped.err
        assert len(rows(out)) < 120
        done = killed_twice(command, out, (40, 80))
    assert done.code == 0, done.err
    assert [row["text"] for row in rows(out)] == [f"caption {number}" for number in range(120)]
    assert max(server.hits.values()) <= 2 + 3  # one repetition, and what was under way when the runs ended
    assert server.hits.total() < 120 + 18 + 3 * 40


@pytest.mark.external
def test_2000_images_killed_twice_in_memory_that_does_not_grow(tmp_path: Path) -> None:
    photos, out = save_numbered(tmp_path / "photos", 2000), tmp_path / "captions.jsonl"
    with serving(answer_slowly) as server:
        done = killed_twice((*arguments(server, photos, out),), out, (300, 900))
    assert done.code == 0, done.err
    assert [row["text"] for row in rows(out)] == [f"caption {number}" for number in range(2000)]
    assert max(server.hits.values()) <= 4


@contextmanager
def transformers_serve(model: Path, log: Path) -> Iterator[str]:
    """The address of `transformers serve` with a model, once it answers."""
    port = unused_address().split(":")[2].split("/")[0]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(model)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        flags = ["--host", "127.0.0.1", "--port", port, "--device", "cpu"]
        process = subprocess.Popen([*command, *flags], stdout=output, stderr=output, env=env)
    try:
        wait_until(lambda: is_open(int(port)), process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.external
def test_transformers_serve_captions_200_images_killed_twice(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from chat_model import save_llava

    model = save_llava(tmp_path / "llava")
    photos, out = save_numbered(tmp_path / "photos", 200, size=(60, 40)), tmp_path / "captions.jsonl"
    with transformers_serve(model, tmp_path / "serve.log") as url:
        command = ("caption", photos, "--endpoint", url, "--model", model, "--out", out, "--max-new-tokens", 6)
        command += ("--on-bad", "keep", "--prompt", "describe this image.", "--concurrency", 4)
        done = killed_twice(command, out, (40, 110))
    assert done.code == 0, (done.err, (tmp_path / "serve.log").read_text()[-3000:])
    assert [row["file_name"] for row in rows(out)] == [f"{number:04}.png" for number in range(200)]
    assert {row["score"] for row in rows(out)} == {None}
    assert run_file(out)["usage"]["completion_tokens"] > 0
