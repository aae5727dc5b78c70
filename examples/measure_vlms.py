"""Vision-language models of real size with random weights: capcli's decode loop beside transformers' generate(), in one process.

    python examples/measure_vlms.py PHOTOS --model smolvlm-256m --images 8 --runs 3

Both get the same loaded images, one after the other, and caption them with greedy search and with 4 beams. The table has the
median of the runs, the ratio of the two, and the memory of a slot: as it was forecast and as it was allocated.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from capcli import pixels
from capcli.captioning.generate_captioner import GenerateCaptioner
from capcli.captioning.processed import Given
from capcli.captioning.vlm_captioner import VlmCaptioner
from capcli.models.auto import collect_any, load_auto, without_video
from capcli.models.checkpoint import quiet_transformers
from capcli.models.hub import find_model
from capcli.models.model_files import ModelFiles
from capcli.options import GenerationOptions

TEXT = ["a photo of a dog on a beach and a red boat near the water"] * 20
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}assistant:"
)
TOKENS = 24  # of each caption: random weights end none


def tokenizer(specials: list[str], **named: str) -> Any:
    """A byte-level tokenizer, for models whose vocabulary is larger: only the number of tokens matters here."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ids = ["<pad>", "<s>", "</s>", *specials, *named.values()]
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, special_tokens=ids, show_progress=False)
    core.train_from_iterator(TEXT, trainer)
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    return t.PreTrainedTokenizerFast(tokenizer_object=core, **ends, extra_special_tokens=named)


def smolvlm(tiles: int) -> tuple[Any, Any]:
    """SmolVLM-256M; `tiles` is how many parts of 512 pixels are along the longest edge of an image."""
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    words = tokenizer(
        ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>", *rows], image_token="<image>"
    )
    text = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49280,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = t.SmolVLMConfig(
        vision_config={**vision, "image_size": 512, "patch_size": 16},
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=4,
        tie_word_embeddings=True,
    )
    images = t.SmolVLMImageProcessorPil(
        size={"longest_edge": 512 * tiles}, max_image_size={"longest_edge": 512}, do_image_splitting=tiles > 1
    )
    processor = without_video(t.SmolVLMProcessor)(
        images, words, video_processor=None, image_seq_len=64, chat_template=CHAT.replace("IMAGE", "<image>")
    )
    return config, processor


def qwen3vl() -> tuple[Any, Any]:
    """Qwen3-VL-2B."""
    words = tokenizer(["<|vision_start|>", "<|vision_end|>"], image_token="<|image_pad|>", video_token="<|video_pad|>")
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    text = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
            "rope_theta": 5000000.0,
        },
    }
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 2048,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    config = t.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    images = t.Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216})
    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return config, without_video(t.Qwen3VLProcessor)(images, words, chat_template=chat)


MODELS: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "smolvlm-256m": lambda: smolvlm(4),
    "smolvlm-256m-one-tile": lambda: smolvlm(1),
    "qwen3-vl-2b": qwen3vl,
}
LOADERS = {"smolvlm": "SmolVLMForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}


def save(name: str, folder: str) -> None:
    """Save the model with random weights to `folder`."""
    config, processor = MODELS[name]()
    torch.manual_seed(0)
    model = getattr(t, LOADERS[config.model_type])(config)
    model.generation_config = t.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def loaded(folder: str) -> tuple[VlmCaptioner, GenerateCaptioner]:
    """Both captioners, with one set of weights."""
    files: ModelFiles = find_model(folder, None, quiet=True, take=collect_any)
    auto = load_auto(files, "float32", torch.device("cpu"))
    return VlmCaptioner(auto, files, "float32"), GenerateCaptioner(auto, files, "float32")


def photos(folder: str, count: int) -> list[str]:
    found = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    return sorted(name for name in found if name.lower().endswith((".jpg", ".jpeg", ".png")))[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--model", choices=MODELS, default="smolvlm-256m")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-image-edge", type=int)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        save(given.model, folder)
        slots, generate = loaded(folder)
    edge = given.max_image_edge or slots.auto.bound_edge(None)
    images = [
        pixels.load_whole(path, max_pixels=1 << 30, max_edge=edge)[0] for path in photos(given.photos, given.images)
    ]
    print(f"{given.model}: {len(images)} images, {torch.get_num_threads()} threads, {TOKENS} tokens each", flush=True)
    for beams in (1, 4):
        options = GenerationOptions(num_beams=beams, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        compare(slots, generate, images, options, given)


def compare(slots: VlmCaptioner, generate: GenerateCaptioner, images: list[Any], options: Any, given: Any) -> None:
    search = slots.settings(options, Given(max_edge=slots.auto.bound_edge(None)))
    seconds: dict[str, list[float]] = {"slots": [], "generate": []}
    texts: dict[str, list[str]] = {}
    text_model = slots.step.text
    for _ in range(given.runs):
        for name, captioner, attention in (("slots", slots, "capcli-grouped"), ("generate", generate, "sdpa")):
            text_model.set_attn_implementation(attention)
            began = time.perf_counter()
            results = list(captioner.caption(images, options))
            seconds[name].append(time.perf_counter() - began)
            texts[name] = [getattr(result, "text", "failed") for result in results]
    slow, fast = (statistics.median(seconds[name]) for name in ("generate", "slots"))
    same = sum(a == b for a, b in zip(texts["slots"], texts["generate"], strict=True))
    allocated = sum(x.nbytes for x in slots.runtime.buffers) // len(images)
    print(
        f"{options.num_beams} beams: slots {fast:.1f} s, generate {slow:.1f} s, {slow / fast:.2f} times as fast, "
        f"{same} of {len(images)} captions equal; a slot has {allocated / 2**20:.1f} MiB "
        f"(forecast {slots.runtime.pool_bytes(search.search) / 2**20:.1f}), prompts of up to {search.search.prompt_room} tokens",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
