"""The files of a captioner: from a folder, from the cache, and from a hub with all its errors."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, Repo, files_of

from capcli.errors import CapcliError, UsageError
from capcli.models.hub import find_model
from capcli.models.load_errors import explain_load_error
from capcli.models.model_files import ModelFiles, fingerprint

NAME = "someone/captioner"
NAMESPACE = ("unshare", "--map-root-user", "--mount")
NEEDED = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
}
RESOLVE = """
import dataclasses, json, sys
from capcli.errors import CapcliError
from capcli.models.hub import find_model
for model, revision in json.loads(sys.argv[1]):
    try:
        answer = dataclasses.asdict(find_model(model, revision))
    except CapcliError as error:
        answer = {"error": str(error), "exit": error.exit_code}
    print(json.dumps(answer), flush=True)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.fixture(scope="session")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner of a few thousand random weights, as transformers saves it."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import (
        GPT2Config,
        PreTrainedTokenizerFast,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    folder = tmp_path_factory.mktemp("models") / "captioner"
    torch.manual_seed(0)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(
            hidden_size=8, intermediate_size=8, image_size=8, patch_size=8, num_hidden_layers=1, num_attention_heads=1
        ),
        GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=16, bos_token_id=0, eos_token_id=0),
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    VisionEncoderDecoderModel(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1, "dog": 2}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture
def model(captioner: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(captioner, tmp_path / "model"))


@pytest.fixture
def hub(captioner: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        repo = Repo()
        repo.push({**files_of(captioner), **UNNEEDED})
        hub.repos[NAME] = repo
        yield hub


UNNEEDED = {
    "README.md": b"hello",
    "pytorch_model.bin": b"pickle",
    "tf_model.h5": b"tf",
    "flax_model.msgpack": b"flax",
    "onnx/model.onnx": b"onnx",
    "modeling_captioner.py": b"raise SystemExit",
    "training_args.bin": b"pickle",
}


@pytest.fixture
def ask(hub: FakeHub, tmp_path: Path) -> Asker:
    return Asker(hub.url, tmp_path / "home")


class Asker:
    """Calls `find_model` in a process of its own: huggingface_hub reads its settings when it is imported."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.home = home
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        self.environment = {
            **inherited,
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }

    def start(self, *questions: tuple[str, str | None], **environment: str) -> subprocess.Popen[str]:
        return self._process([sys.executable, "-c", RESOLVE, json.dumps(questions)], environment)

    def _process(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def many(
        self, *questions: tuple[str, str | None], under: str = "", mounts: bool = False, **environment: str
    ) -> list[dict[str, Any]]:
        """The files or the error of each (model, revision), from one process.

        `under` is a shell command that prepares the process; with `mounts` it may mount.
        """
        command = [sys.executable, "-c", RESOLVE, json.dumps(questions)]
        if under:
            command = [*(NAMESPACE if mounts else ()), "sh", "-c", f'{under} && exec "$@"', "sh", *command]
        out, err = self._process(command, environment).communicate(timeout=60)
        assert "Traceback" not in err
        answers = [json.loads(line) for line in out.splitlines()]
        assert len(answers) == len(questions), err
        return answers

    def __call__(self, model: str = NAME, revision: str | None = None, **keywords: Any) -> dict[str, Any]:
        return self.many((model, revision), **keywords)[0]

    def error(self, *args: Any, code: int = 1, **keywords: Any) -> str:
        return message_of(self(*args, **keywords), code)


def message_of(answer: dict[str, Any], code: int = 1) -> str:
    assert answer.get("exit") == code, answer
    message = str(answer["error"])
    assert "\n" not in message
    return message


def nobody_listens() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# From the hub


def test_the_needed_files_are_downloaded_and_later_runs_need_no_hub(hub: FakeHub, ask: Asker, captioner: Path) -> None:
    first = ask()
    assert hub.fetched() == NEEDED
    assert first["revision"] == hub.repos[NAME].refs["main"]
    assert first["name"] == NAME
    assert fingerprint(first["folder"]) == fingerprint(str(captioner))
    assert first["processor"]["size"] == {"height": 8, "width": 8}

    hub.asked.clear()
    assert ask() == first
    assert hub.asked == [f"GET /api/models/{NAME}/revision/main"], "a cached model needs one request"
    assert ask(HF_HUB_OFFLINE="1") == first
    assert len(hub.asked) == 1
    assert ask(HF_ENDPOINT=nobody_listens()) == first
    hub.status = 503
    assert ask() == first


def test_config_is_read_before_anything_else_is_fetched(hub: FakeHub, ask: Asker, captioner: Path) -> None:
    """Neither for an unsupported architecture nor for a missing file are weights downloaded."""
    blip = {"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"]}
    hub.repos[NAME].push({"config.json": json.dumps(blip).encode(), "model.safetensors": b"x"})
    files = files_of(captioner)
    del files["preprocessor_config.json"]
    hub.repos["someone/incomplete"] = Repo()
    hub.repos["someone/incomplete"].push(files)
    unsupported, incomplete = map(message_of, ask.many((NAME, None), ("someone/incomplete", None)))
    assert "is not supported: blip-2" in unsupported
    assert "someone/incomplete on the hub lacks preprocessor_config.json" in incomplete
    assert hub.fetched() == {"config.json"}


def test_all_shards_are_downloaded(hub: FakeHub, ask: Asker, captioner: Path, tmp_path: Path) -> None:
    from transformers import VisionEncoderDecoderModel

    folder = tmp_path / "sharded"
    VisionEncoderDecoderModel.from_pretrained(captioner).save_pretrained(folder, max_shard_size="2KB")
    shards = files_of(folder)
    assert len(shards) > 3
    rest = {name: data for name, data in files_of(captioner).items() if name != "model.safetensors"}
    hub.repos[NAME].push({**rest, **shards, "pytorch_model.bin": b""})
    answer = ask()
    assert hub.fetched() == NEEDED - {"model.safetensors"} | set(shards)
    VisionEncoderDecoderModel.from_pretrained(answer["folder"])

    lost = next(name for name in shards if name.startswith("model-00002"))
    Path(answer["folder"], lost).unlink()
    assert f"lacks {lost}, which model.safetensors.index.json names" in ask.error(HF_HUB_OFFLINE="1")


def test_pickled_weights_are_used_where_there_are_no_others(hub: FakeHub, ask: Asker, captioner: Path) -> None:
    files = files_of(captioner)
    del files["model.safetensors"]
    hub.repos[NAME].push({**files, "pytorch_model.bin": b"weights", "tf_model.h5": b""})
    ask()
    assert hub.fetched() == NEEDED - {"model.safetensors"} | {"pytorch_model.bin"}


def test_revisions(hub: FakeHub, ask: Asker, captioner: Path) -> None:
    repo = hub.repos[NAME]
    old = repo.refs["main"]
    repo.refs["v1"] = old
    new = repo.push({**files_of(captioner), "generation_config.json": b'{"max_length": 9}'})
    tagged, newest, unknown = ask.many((NAME, "v1"), (NAME, None), (NAME, "nosuch"))
    assert tagged["revision"] == old
    assert newest["revision"] == new
    assert "no revision nosuch" in message_of(unknown, 2)
    hub.asked.clear()
    assert ask(NAME, old)["revision"] == old
    tagged, unknown = ask.many((NAME, "v1"), (NAME, "nosuch"), HF_HUB_OFFLINE="1")
    assert tagged["revision"] == old
    assert f"{NAME} at revision nosuch is not in the cache" in message_of(unknown)
    assert not hub.asked, "a commit that is in the cache needs no hub"


def test_a_token_opens_a_private_model(hub: FakeHub, ask: Asker) -> None:
    hub.repos[NAME].token = "secret"
    assert "`hf auth login`" in ask.error()
    assert "revision" in ask(HF_TOKEN="secret")
    assert "revision" in ask(), "the cached copy needs no token"


def test_the_refusals_of_a_hub(hub: FakeHub, ask: Asker, captioner: Path) -> None:
    hub.repos = {f"someone/{status}": Repo(status=status) for status in (401, 403, 404, 429, 500)}
    hub.repos["someone/gated"] = Repo(gated=True)
    hub.repos["someone/gated"].push(files_of(captioner))
    messages = {
        "someone/401": "refuses the token: log in with `hf auth login`, or correct HF_TOKEN",
        "someone/403": "denies access to someone/403: use a token that has access (HF_TOKEN)",
        "someone/404": "status 404",
        "someone/429": "no more requests for now",
        "someone/500": "status 500",
        "someone/gated": f"accept its terms at {hub.url}/someone/gated, then log in with `hf auth login`",
        "someone/captoiner": "no folder someone/captoiner here, and no such model on the hub",
    }
    answers = ask.many(*((name, None) for name in messages))
    for answer, message in zip(answers, messages.values(), strict=True):
        assert message in message_of(answer)


def test_a_hub_that_cannot_be_reached(hub: FakeHub, ask: Asker) -> None:
    message = ask.error(HF_ENDPOINT=nobody_listens())
    assert "Connection refused" in message
    assert "HF_ENDPOINT" in message
    assert "give --model a folder" in message
    assert f"{NAME} is not in the cache ({ask.home / 'hub'})" in message
    assert "cannot be reached" in ask.error(HF_ENDPOINT=hub.url.replace("http", "https"))
    assert "cannot be reached" in ask.error(HF_ENDPOINT="nonsense")
    hub.body = b"<html>Log in to the hotel's network</html>"
    assert "the server there is not a hub" in ask.error()
    hub.silent.set()
    assert "timed out" in ask.error()


def test_offline_and_not_in_the_cache(hub: FakeHub, ask: Asker) -> None:
    message = ask.error(HF_HUB_OFFLINE="1")
    assert "is not in the cache" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert not hub.asked


# Interrupted downloads


def test_a_dropped_connection_is_resumed(hub: FakeHub, ask: Asker, captioner: Path) -> None:
    hub.drops["model.safetensors"] = 1
    assert fingerprint(ask()["folder"]) == fingerprint(str(captioner))


def test_a_killed_download_starts_again_and_hides_no_earlier_one(hub: FakeHub, ask: Asker, captioner: Path) -> None:
    before = ask()
    newer = {**files_of(captioner), "model.safetensors": (captioner / "model.safetensors").read_bytes() + b"newer"}
    commit = hub.repos[NAME].push(newer)
    hub.stalls.add("model.safetensors")
    process = ask.start((NAME, None))
    assert hub.half_sent.wait(30)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)

    assert ask(HF_HUB_OFFLINE="1") == before, "the model downloaded before is still used"
    hub.stalls.clear()
    answer = ask()
    assert answer["revision"] == commit
    assert Path(answer["folder"], "model.safetensors").read_bytes() == newer["model.safetensors"]


def test_a_disk_without_room(hub: FakeHub, ask: Asker, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {small}"
    if (
        not shutil.which(NAMESPACE[0])
        or subprocess.run([*NAMESPACE, "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("no mount namespaces here")
    hub.repos[NAME].push({**hub.repos[NAME].commits[hub.repos[NAME].refs["main"]], "model.safetensors": b"x" * 999_999})
    message = ask.error(under=mount, mounts=True, HF_HOME=str(small))
    assert f"No room for {NAME} in {small / 'hub'} (No space left on device)" in message
    assert "HF_HOME" in message

    message = ask.error(under=f"{mount} && mount -o remount,ro {small}", mounts=True, HF_HOME=str(small))
    assert f"Cannot store {NAME} in {small / 'hub'} (Read-only file system" in message


def test_a_file_size_limit(hub: FakeHub, ask: Asker) -> None:
    hub.repos[NAME].push({**hub.repos[NAME].commits[hub.repos[NAME].refs["main"]], "model.safetensors": b"x" * 999_999})
    assert f"No room for {NAME}" in ask.error(under="ulimit -f 100")


def test_a_cache_that_cannot_be_made(ask: Asker, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    message = ask.error(HF_HOME=str(blocked))
    assert f"Cannot store {NAME} in {blocked / 'hub'}" in message
    assert "set HF_HOME" in message


# What cannot be a model


@pytest.mark.parametrize(
    "name", ["./nosuch", "../nosuch", "/x/y/z", "~/nosuch", "nosuch/", "a/b/c", "a b", "é", "", "a--b"]
)
def test_names_that_are_neither_folder_nor_model(name: str) -> None:
    with pytest.raises(UsageError, match="No such folder"):
        find_model(name)


def test_a_file_is_no_model(model: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        find_model(str(model / "model.safetensors"))


def test_a_folder_has_no_revisions(model: Path) -> None:
    with pytest.raises(UsageError, match="--revision is for models on the hub"):
        find_model(str(model), "main")


# From a folder


def test_a_folder_imports_no_hub(captioner: Path) -> None:
    script = f"{RESOLVE}\nassert 'huggingface_hub' not in sys.modules"
    command = [sys.executable, "-c", script, json.dumps([(str(captioner), None)])]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert answer["folder"] == answer["name"] == str(captioner)
    assert answer["revision"] is None
    assert answer["config"]["model_type"] == "vision-encoder-decoder"


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "lacks weights (model.safetensors or pytorch_model.bin)"),
        ("preprocessor_config.json", "lacks preprocessor_config.json"),
        ("tokenizer.json", "lacks its tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_file(model: Path, removed: str, message: str) -> None:
    (model / removed).unlink()
    with pytest.raises(CapcliError, match=re.escape(f"{model} {message}")):
        find_model(str(model))


def test_weights_of_another_framework_are_named(model: Path) -> None:
    (model / "model.safetensors").rename(model / "tf_model.h5")
    with pytest.raises(CapcliError, match=r"tf_model\.h5 belongs to another framework"):
        find_model(str(model))


def test_a_nested_processor_comes_first(model: Path) -> None:
    (model / "processor_config.json").write_text('{"image_processor": {"size": {"height": 4, "width": 4}}}')
    assert find_model(str(model)).processor["size"] == {"height": 4, "width": 4}
    (model / "preprocessor_config.json").unlink()
    assert find_model(str(model)).processor["size"] == {"height": 4, "width": 4}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff", "[" * 100_000])
def test_a_config_that_is_not_an_object(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CapcliError, match=r"config\.json of .* is not (JSON|a JSON object)"):
        find_model(str(model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "blip-2"}, "is not supported: blip-2"),
        ({"model_type": "blip_2_qformer", "auto_map": {}}, "own code, which capcli never runs"),
        ({"model_type": "own", "auto_map": {"AutoModel": "m.M"}}, "own code, which capcli never runs"),
        ({"architectures": ["X"]}, "['X']"),
        ({}, "no model_type"),
        ({"model_type": "vision-encoder-decoder", "encoder": {"model_type": "clip"}}, "of clip and None"),
        ({"model_type": "vision-encoder-decoder", "encoder": "vit", "decoder": []}, "of None and None"),
    ],
)
def test_architectures_that_are_not_supported(model: Path, config: dict[str, Any], message: str) -> None:
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CapcliError, match=re.escape(message)) as caught:
        find_model(str(model))
    assert "vision-encoder-decoder with an encoder of vit, deit, beit, swin, swinv2" in str(caught.value)


def test_vision_language_models_are_for_captioning(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "smolvlm", "text_config": {"model_type": "llama"}}))
    with pytest.raises(CapcliError, match="capcli caption runs it, this command does not"):
        find_model(str(model))


# The fingerprint


def test_the_fingerprint_is_of_the_files_that_captions_depend_on(model: Path, tmp_path: Path) -> None:
    before = fingerprint(str(model))
    for name, data in UNNEEDED.items():
        if "/" not in name:
            (model / name).write_bytes(data)
    moved = model.rename(tmp_path / "elsewhere")
    assert fingerprint(str(moved)) == before
    for name in NEEDED:
        data = (moved / name).read_bytes()
        (moved / name).write_bytes(data + b" ")
        assert fingerprint(str(moved)) != before, name
        (moved / name).write_bytes(data)
    assert fingerprint(str(moved)) == before


# Errors of loading


def load(folder: Path) -> str:
    """The message for what loading these files raises."""
    from transformers import VisionEncoderDecoderModel

    files = find_model(str(folder))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, it must be explained
        VisionEncoderDecoderModel.from_pretrained(files.folder)
    return str(explain_load_error(caught.value, files))


def test_truncated_weights(model: Path) -> None:
    path = model / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    assert f"{path} cannot be used: it has {size - 100:,} bytes where its header gives {size:,}" in load(model)
    os.truncate(path, 20)
    assert "its header is damaged" in load(model)
    os.truncate(path, 0)
    assert "it is empty" in load(model)


def test_truncated_weights_in_the_cache(model: Path) -> None:
    folder = model / "hub" / "models--a--b" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    files = ModelFiles("a/b", str(folder), "abc", {}, {})
    message = str(explain_load_error(ValueError("short"), files))
    assert f"Remove {folder.parents[1]}, and the next run downloads the model again" in message


def test_weights_that_are_a_git_lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "`git lfs pull`" in load(model)


def test_weights_of_another_model(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["decoder"]["vocab_size"] = 17
    (model / "config.json").write_text(json.dumps(config))
    assert "do not fit its config.json" in load(model)


def test_a_pickle_is_not_run(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    trap = tmp_path / "ran"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(str(trap)), protocol=2))
    assert "unpickling runs code" in load(model)
    assert not trap.exists()


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "config.json"), "Cannot read config.json: Permission denied"),
        (ValueError("needs `trust_remote_code=True`"), "capcli runs no code of a model"),
        (ImportError("needs sentencepiece"), "not installed: needs sentencepiece"),
        (MemoryError(), "Not enough memory"),
        (KeyError("x"), "Cannot load name from"),
    ],
)
def test_other_errors_of_loading(captioner: Path, error: Exception, message: str) -> None:
    files = ModelFiles("name", str(captioner), None, {}, {})
    assert message in str(explain_load_error(error, files))
