"""LoRA adapters: `capcli caption --adapter` equals the model into which peft merged the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, save_family
from running import call, execute, paint, save_captioner
from vlms import save_vlm

from capcli import Caption, Captioner
from capcli.models.families import family_of
from capcli.models.model_files import is_vlm

peft = pytest.importorskip("peft")
TARGETS = r".*(q_proj|query|self_attn\.v_proj|v_proj|value)"
FLAGS = ("--dtype", "float32", "--device", "cpu", "--workers", 0, "--max-new-tokens", 8)
KINDS = [
    "llava",
    "smolvlm",
    "qwen3-vl",
    "kosmos-2",
    *(name for name in ("blip", "git", "florence2") if name in FAMILIES),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("photos"), "a.png", "b.png", "c.png")


def save_base(folder: Path, kind: str) -> Path:
    return save_family(folder, kind) if kind in FAMILIES else save_vlm(folder, kind)


def loader_of(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    if is_vlm(config) or config["model_type"] == "kosmos-2":
        return getattr(transformers, config["architectures"][0])
    return getattr(transformers, family_of(config).LOADER)


def adapted(base: Path, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """An adapter of random weights for a model, and the model into which peft merged it."""
    model = loader_of(base).from_pretrained(base)
    torch.manual_seed(seed)
    whole = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    whole.save_pretrained(folder / "adapter")
    merged = folder / "merged"
    merged.mkdir()
    for file in base.iterdir():
        (merged / file.name).write_bytes(file.read_bytes())
    whole.merge_and_unload().save_pretrained(merged)
    return folder / "adapter", merged


def rows(done: Any) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    found: list[dict[str, Any]] = done.rows
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_gives_the_captions_of_the_merged_model(kind: str, photos: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", kind)
    adapter, merged = adapted(base, tmp_path)
    plain, expected = (rows(call("caption", photos, "--model", model, *FLAGS)) for model in (base, merged))
    assert plain != expected
    assert rows(call("caption", photos, "--model", base, "--adapter", adapter, *FLAGS)) == expected
    assert rows(call("caption", photos, "--adapter", adapter, *FLAGS)) == expected  # its base is in adapter_config.json
    assert rows(call("caption", photos, "--model", adapter, *FLAGS)) == expected
    captioner = Captioner.load(str(base), adapter=str(adapter), device="cpu", dtype="float32")
    results = captioner.caption(sorted(map(str, photos.iterdir())), max_new_tokens=8)
    assert [each.text for each in results if isinstance(each, Caption)] == [row["text"] for row in expected]


def test_a_run_continues_only_with_its_adapter(photos: Path, tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "base", "llava"), tmp_path / "captions.jsonl"
    one, other = (adapted(base, folder, seed)[0] for seed, folder in enumerate(folders(tmp_path)))
    command = ("caption", photos, "--model", base, "--out", out, "--limit", 1, *FLAGS)
    assert call(*command, "--adapter", one).code == 0
    assert json.loads(out.with_suffix(".run.json").read_text())["model"]["name"] == f"{base} with {one}"
    for flags in (("--adapter", other), ()):
        refused = call(*command, *flags)
        assert (refused.code, "adapter" in refused.err) == (2, True), refused.err
    assert call(*command, "--adapter", one).code == 0
    assert len(out.read_text().splitlines()) == 2


def folders(root: Path) -> list[Path]:
    found = [root / "one", root / "other"]
    for folder in found:
        folder.mkdir()
    return found


def test_what_cannot_be_merged_is_said(photos: Path, tmp_path: Path) -> None:
    base, other = save_base(tmp_path / "base", "llava"), save_captioner(tmp_path / "captioner")
    adapter, _ = adapted(base, tmp_path)

    def message(*flags: object, code: int = 1) -> str:
        done = call("caption", photos, *flags, *FLAGS)
        assert (done.code, "Traceback" in done.err) == (code, False), done.err
        return str(done.err)

    assert "the adapter does not fit the model" in message("--model", other, "--adapter", adapter)
    assert "has no adapter_config.json" in message("--model", base, "--adapter", other)
    (adapter / "adapter_model.safetensors").rename(tmp_path / "weights")
    assert "lacks adapter_model.safetensors" in message("--model", base, "--adapter", adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    assert str(adapter) in message("--model", base, "--adapter", adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    assert "does not name its base model" in message("--adapter", adapter)


def test_a_missing_peft_is_named(photos: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llava")
    adapter, _ = adapted(base, tmp_path)
    (tmp_path / "packages/peft").mkdir(parents=True)
    (tmp_path / "packages/peft/__init__.py").write_text(
        "raise ModuleNotFoundError('No module named peft', name='peft')"
    )
    done = execute("caption", photos, "--adapter", adapter, *FLAGS, env={"PYTHONPATH": str(tmp_path / "packages")})
    assert done.code == 1
    assert "pip install 'capcli[peft]'" in done.err
