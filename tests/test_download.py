"""`capcli prepare --url-column`: images from a local HTTP server that responds as servers in the wild do."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from running import Ended, call, ended, spawn, wait_until

HUGE = 200_000  # bytes, as --max-bytes of the tests that need it


def png(number: int) -> bytes:
    """A picture that encodes `number` in its colour."""
    file = io.BytesIO()
    pixels = np.full((8, 9, 3), (number % 251, number // 251, 7), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def number_of(row: dict[str, Any]) -> int:
    red, green, blue = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))[0, 0].tolist()
    assert blue == 7
    return red + 251 * green


class Handler(BaseHTTPRequestHandler):
    """Serves `/verb/number`: the verb decides the response, the number the picture."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.hits[self.path] += 1
            self.server.agents[self.headers["User-Agent"]] += 1
            self.server.cookies[self.headers["Cookie"]] += 1
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        try:
            _, verb, number = self.path.split("/")[:3]
            self.act(verb, int(number))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def act(self, verb: str, number: int) -> None:
        first = self.server.hits[self.path] == 1
        if verb in ACTS:
            ACTS[verb](self, number)
        elif verb == "busy" and first:
            self.answer(429, b"later", {"Retry-After": "1"})
        elif verb == "flaky" and first:
            self.answer(503, b"")
        elif verb == "cut" and first:
            self.answer(200, png(number)[:20], {"Content-Length": "400"})
            self.close_connection = True
        else:
            self.answer(200, png(number), {"Content-Type": "image/png", "Set-Cookie": "you=known"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def trickle(self, number: int) -> None:
        """A response that never ends."""
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        while not self.server.ending.wait(0.05):
            self.wfile.write(png(number)[:1])

    def trickle_headers(self, _number: int) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not self.server.ending.wait(0.05):
            self.wfile.write(b"X")

    def hang(self, _number: int) -> None:
        self.server.ending.wait(60)
        self.close_connection = True

    def pour(self, _number: int) -> None:
        """More than --max-bytes, without a Content-Length."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(bytes(HUGE // 10))
        self.close_connection = True

    def slam(self, _number: int) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


ACTS: dict[str, Callable[[Handler, int], None]] = {
    "missing": lambda self, _: self.answer(404, b"not found"),
    "gone": lambda self, _: self.answer(410, b""),
    "broken": lambda self, _: self.answer(500, b""),
    "never": lambda self, _: self.answer(429, b"", {"Retry-After": "86400"}),
    "page": lambda self, _: self.answer(200, b"<!DOCTYPE html><p>Hello", {"Content-Type": "image/jpeg"}),
    "json": lambda self, _: self.answer(200, b'{"error": "no"}', {"Content-Type": "application/json"}),
    "text": lambda self, n: self.answer(200, png(n), {"Content-Type": "text/plain"}),
    "half": lambda self, n: self.answer(200, png(n)[:45]),
    "empty": lambda self, _: self.answer(200, b""),
    "packed": lambda self, n: self.answer(200, gzip.compress(png(n)), {"Content-Encoding": "gzip"}),
    "moved": lambda self, n: self.answer(302, b"", {"Location": f"/ok/{n}"}),
    "circle": lambda self, n: self.answer(302, b"", {"Location": f"/circle/{n}"}),
    "to-ftp": lambda self, _: self.answer(302, b"", {"Location": "ftp://example.org/a.png"}),
    "claims": lambda self, _: self.answer(200, b"", {"Content-Length": str(HUGE + 1)}),
    "pour": Handler.pour,
    "trickle": Handler.trickle,
    "trickle-headers": Handler.trickle_headers,
    "hang": Handler.hang,
    "slam": Handler.slam,
    "pause": lambda self, n: (time.sleep(0.1), self.answer(200, png(n)))[1],
}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), Handler)
        self.lock = threading.Lock()
        self.ending = threading.Event()
        self.hits: Counter[str] = Counter()
        self.agents: Counter[str | None] = Counter()
        self.cookies: Counter[str | None] = Counter()
        self.busy = self.busiest = 0

    def address(self, verb: str, number: int) -> str:
        return f"http://127.0.0.1:{self.server_port}/{verb}/{number}"


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as server:
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def table(path: Path, addresses: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "text"])
        writer.writerows([address, f"caption of {address}"] for address in addresses)
    return path


def arguments(data: Path, out: Path, *more: object) -> list[object]:
    common = ["--format", "png", "--workers", 0]
    return ["prepare", "--data", data, "--url-column", "url", "--out", out, *common, *more]


def download(data: Path, out: Path, *more: object) -> Ended:
    return call(*arguments(data, out, *more))


def stored(out: Path) -> dict[str, dict[str, Any]]:
    rows = datasets.load_from_disk(str(out))["train"].cast_column("image", datasets.Image(decode=False))
    return {row["file_name"]: row for row in rows}


def failures(out: Path) -> dict[str, tuple[str, str]]:
    path = out / "failures.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["file_name"]: (row["error"], row["message"]) for row in rows}


def test_each_url_gives_its_own_image(server: Server, tmp_path: Path) -> None:
    addresses = [server.address("ok", number) for number in range(260)]
    ran = download(table(tmp_path / "t.csv", addresses), tmp_path / "out", "--shard-size", 70)
    assert ran.code == 0, ran.err
    rows = stored(tmp_path / "out")
    assert list(rows) == addresses
    for number, (address, row) in enumerate(rows.items()):
        assert row["captions"] == [f"caption of {address}"]
        assert number_of(row) == number
    assert set(server.hits.values()) == {1}
    assert all(agent and agent.startswith("capcli/") for agent in server.agents)
    assert set(server.cookies) == {None}
    assert sorted(os.listdir(tmp_path / "out")) == ["dataset_dict.json", "manifest.json", "train"]


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_tables_of_other_kinds(kind: str, server: Server, tmp_path: Path) -> None:
    rows = [{"link": server.address("ok", number), "text": f"caption {number}"} for number in range(3)]
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "tsv":
        path.write_text("text\tlink\n" + "".join(f"{row['text']}\t{row['link']}\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    given = arguments(path, tmp_path / "out")
    given[given.index("url")] = "link"
    ran = call(*given)
    assert ran.code == 0, ran.err
    assert [row["captions"] for row in stored(tmp_path / "out").values()] == [
        ["caption 0"],
        ["caption 1"],
        ["caption 2"],
    ]


def test_transient_errors_are_tried_again(server: Server, tmp_path: Path) -> None:
    verbs = ["ok", "busy", "flaky", "cut", "moved", "packed", "text"]
    addresses = [server.address(verb, number) for number, verb in enumerate(verbs)]
    ran = download(table(tmp_path / "t.csv", addresses), tmp_path / "out")
    assert ran.code == 0, failures(tmp_path / "out")
    assert [number_of(row) for row in stored(tmp_path / "out").values()] == list(range(len(verbs)))
    assert [server.hits[f"/{verb}/{number}"] for number, verb in enumerate(verbs)] == [1, 2, 2, 2, 1, 1, 1]


REFUSED = {
    "missing": ("http-404", "HTTP 404 Not Found"),
    "gone": ("http-410", "HTTP 410 Gone"),
    "broken": ("http-500", "HTTP 500 Internal Server Error"),
    "page": ("wrong-content", "the server sent image/jpeg, not an image"),
    "json": ("wrong-content", "the server sent application/json, not an image"),
    "half": ("unreadable", ""),
    "empty": ("empty", "the file is empty"),
    "circle": ("redirects", "redirected more than"),
    "to-ftp": ("address", "something other than an http or https address"),
    "claims": ("too-large", "--max-bytes"),
    "pour": ("too-large", "--max-bytes"),
    "slam": ("connection", "the connection broke"),
}


def test_a_download_that_fails_is_a_failure_with_its_reason(server: Server, tmp_path: Path) -> None:
    addresses = {verb: server.address(verb, 0) for verb in REFUSED}
    others = {
        "ftp://example.org/a.png": ("address", "not an http or https address"),
        "photos/a.png": ("address", "not an http or https address"),
        "http://[::1": ("address", "not an http or https address"),
        "http://127.0.0.1:99999/a": ("address", "not an http or https address"),
        f"http://127.0.0.1:{free_port()}/a.png": ("unreachable", "could not be reached"),
    }
    data = table(tmp_path / "t.csv", [server.address("ok", 5), *addresses.values(), *others])
    ran = download(data, tmp_path / "out", "--retries", 0, "--max-bytes", HUGE)
    assert ran.code == 3, ran.err
    assert f"{len(REFUSED) + len(others)} images left out" in ran.err
    assert list(stored(tmp_path / "out")) == [server.address("ok", 5)]
    found = failures(tmp_path / "out")
    expected = {addresses[verb]: reason for verb, reason in REFUSED.items()} | others
    assert list(found) == list(expected)
    for address, (kind, part) in expected.items():
        assert found[address][0] == kind, (address, found[address])
        assert part in found[address][1], (address, found[address])
        assert found[address][1].isprintable()
    assert max(server.hits[f"/{verb}/0"] for verb in REFUSED if verb != "circle") == 1


def test_a_wait_that_is_too_long_is_a_failure_of_one_image(server: Server, tmp_path: Path) -> None:
    addresses = [server.address("never", 0), server.address("ok", 1), server.address("broken", 0)]
    began = time.monotonic()
    assert download(table(tmp_path / "t.csv", addresses), tmp_path / "out", "--retries", 1).code == 3
    assert time.monotonic() - began < 10
    assert list(stored(tmp_path / "out")) == [addresses[1]]
    assert failures(tmp_path / "out") == {
        addresses[0]: ("http-429", "HTTP 429 Too Many Requests"),
        addresses[2]: ("http-500", "HTTP 500 Internal Server Error"),
    }
    assert (server.hits["/never/0"], server.hits["/broken/0"]) == (1, 2)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("verb", ["trickle", "trickle-headers", "hang"])
def test_a_download_that_never_ends_times_out(verb: str, server: Server, tmp_path: Path) -> None:
    data = table(tmp_path / "t.csv", [server.address(verb, 0), server.address("ok", 1)])
    began = time.monotonic()
    ran = download(data, tmp_path / "out", "--retries", 0, "--download-timeout", 0.5)
    assert ran.code == 3
    assert failures(tmp_path / "out")[server.address(verb, 0)][0] == "timeout"
    assert time.monotonic() - began < 10


def test_connections_per_host_are_limited(server: Server, tmp_path: Path) -> None:
    data = table(tmp_path / "t.csv", [server.address("pause", number) for number in range(24)])
    assert download(data, tmp_path / "out", "--per-host", 3).code == 0
    assert server.busiest == 3


def test_retry_after_is_respected(server: Server, tmp_path: Path) -> None:
    addresses = [server.address("busy", 0), *(server.address("ok", number) for number in range(1, 6))]
    began = time.monotonic()
    assert download(table(tmp_path / "t.csv", addresses), tmp_path / "out", "--per-host", 1).code == 0
    assert time.monotonic() - began > 1
    assert server.hits["/busy/0"] == 2


def test_a_host_without_responses_is_skipped_after_three(server: Server, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = silent.getsockname()[1]
        dead = [f"http://127.0.0.1:{port}/{number}" for number in range(60)]
        data = table(tmp_path / "t.csv", [*dead, server.address("ok", 3)])
        began = time.monotonic()
        ran = download(data, tmp_path / "out", "--retries", 0, "--download-timeout", 0.5, "--per-host", 1)
    assert ran.code == 3
    assert time.monotonic() - began < 15  # 30 seconds of waiting for each in turn
    found = failures(tmp_path / "out")
    assert list(found) == dead
    assert Counter(kind for kind, _ in found.values()) == {"timeout": 3, "unreachable": 57}


def test_a_network_that_is_down_ends_the_run_without_failures(tmp_path: Path) -> None:
    port = free_port()
    addresses = [f"http://127.0.0.{2 + number % 12}:{port}/ok/{number}" for number in range(150)]
    data = table(tmp_path / "t.csv", addresses)
    ran = download(data, tmp_path / "out", "--retries", 0)
    assert ran.code == 1
    assert "is the network up?" in ran.err
    assert "Run the same command again" in ran.err
    assert not (tmp_path / "out" / "failures.jsonl").exists()
    with serving(Server("0.0.0.0", port)):
        assert download(data, tmp_path / "out", "--retries", 0).code == 0
    assert [number_of(row) for row in stored(tmp_path / "out").values()] == list(range(150))


def test_certificates_are_checked(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate), "-days", "2"]
    subprocess.run([*command, *names], check=True, capture_output=True)
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    with serving(server), serving(Server()) as plain:
        secure = f"https://localhost:{server.server_port}/ok/0"
        data = table(tmp_path / "t.csv", [secure, plain.address("ok", 1)])
        assert download(data, tmp_path / "out").code == 3
    assert failures(tmp_path / "out")[secure][0] == "certificate"


def test_a_killed_run_downloads_nothing_twice(server: Server, tmp_path: Path) -> None:
    addresses = [server.address("pause", number) for number in range(60)]
    data, out = table(tmp_path / "t.csv", addresses), tmp_path / "out"
    more = ("--shard-size", 6, "--connections", 2, "--per-host", 2)
    process = spawn(*arguments(data, out, *more))
    wait_until(lambda: len(list(out.glob("unfinished/train-*.json"))) >= 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    begun = {path.stem: path.read_bytes().count(b'{"position"') for path in out.glob("unfinished/*.part")}
    done = sum(begun.values()) + 6 * len({path.stem for path in out.glob("unfinished/train-*.json")} - begun.keys())
    assert 18 <= done < 60
    before = server.hits.copy()
    assert download(data, out, "--shard-size", 6).code == 0
    assert [number_of(row) for row in stored(out).values()] == list(range(60))
    again = [server.hits[path] - before[path] for path in (f"/pause/{number}" for number in range(60))]
    assert again == [0] * done + [1] * (60 - done)
    assert not (out / "unfinished").exists()


def test_the_number_of_files_downloaded_in_advance_is_bounded(server: Server, tmp_path: Path) -> None:
    data, out = table(tmp_path / "t.csv", [server.address("ok", number) for number in range(100)]), tmp_path / "out"
    process = spawn(*arguments(data, out, "--connections", 2, "--shard-size", 40))
    most = 0
    while process.poll() is None:
        most = max(most, len(list(out.glob("unfinished/downloads/*"))))
        time.sleep(0.005)
    assert ended(process).code == 0
    assert 0 < most <= 2 * 8 + 16 + 2  # in advance, in the window of the decoder processes, and being written
    assert not (out / "unfinished").exists()


def test_an_interrupt_does_not_wait_for_the_shard(server: Server, tmp_path: Path) -> None:
    addresses = [server.address("pause", number) for number in range(250)]
    data, out = table(tmp_path / "t.csv", addresses), tmp_path / "out"
    process = spawn(*arguments(data, out, "--connections", 2))
    wait_until(lambda: sum(server.hits.values()) > 20, process)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    ran = ended(process)
    assert time.monotonic() - began < 8  # all of them take 12.5 seconds
    assert ran.code == 130, ran.err
    before = server.hits.copy()
    assert 20 < sum(before.values()) < 250
    address = server.address("ok", 0)
    table(data, [address if number > 100 else each for number, each in enumerate(addresses)])
    assert download(data, out).code == 2  # other data
    table(data, addresses)
    assert download(data, out, "--connections", 100, "--per-host", 100).code == 0
    assert [number_of(row) for row in stored(out).values()] == list(range(250))
    twice = [path for path, hits in server.hits.items() if hits > 1]
    assert len(twice) <= 2 * 8 + 2


def test_retry_failed_downloads_failures_again(server: Server, tmp_path: Path) -> None:
    addresses = [server.address("flaky" if number % 4 == 1 else "ok", number) for number in range(20)]
    addresses[7] = server.address("missing", 7)
    data, out = table(tmp_path / "t.csv", addresses), tmp_path / "out"
    assert download(data, out, "--retries", 0, "--shard-size", 8).code == 3
    assert len(failures(out)) == 6
    assert download(data, out, "--retries", 0, "--shard-size", 8, "--retry-failed").code == 3
    assert list(failures(out)) == [addresses[7]]
    assert [number_of(row) for row in stored(out).values()] == [n for n in range(20) if n != 7]
    tried_again = {*(f"/flaky/{n}" for n in range(1, 20, 4)), "/missing/7"}
    assert {path for path, hits in server.hits.items() if hits > 1} == tried_again
    assert set(server.hits.values()) == {1, 2}
    fresh = tmp_path / "fresh"
    assert download(data, fresh, "--retries", 0, "--shard-size", 8).code == 3
    assert (out / "manifest.json").read_bytes() == (fresh / "manifest.json").read_bytes()


def test_options_of_downloads_need_a_url_column(tmp_path: Path) -> None:
    data = table(tmp_path / "t.csv", ["a.png"])
    ran = call("prepare", "--data", data, "--out", tmp_path / "out", "--retries", 1)
    assert ran.code == 2
    assert "--retries" in ran.err
    assert "--url-column" in ran.err
    assert not (tmp_path / "out").exists()


def test_blanks_around_a_url_are_ignored(server: Server, tmp_path: Path) -> None:
    address = server.address("ok", 3)
    data = table(tmp_path / "t.csv", [f" {address}\t", address])
    assert download(data, tmp_path / "out").code == 0
    assert list(stored(tmp_path / "out")) == [address]


def test_a_second_interrupt_ends_the_run_at_once_and_no_other_run_may_write(server: Server, tmp_path: Path) -> None:
    data, out = table(tmp_path / "t.csv", [server.address("hang", number) for number in range(50)]), tmp_path / "out"
    process = spawn(*arguments(data, out))
    wait_until(lambda: server.busy >= 8, process)
    second = download(data, out)
    assert (second.code, "another run" in second.err) == (1, True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    ran = ended(process)
    assert time.monotonic() - began < 5
    assert ran.code == 130
    assert "Traceback" not in ran.err
    assert not list(out.glob("unfinished/downloads/*"))
