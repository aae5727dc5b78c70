"""Tiny random checkpoints of vision-language models, complete folders as on the hub: weights, processor, chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from capcli.models.auto import without_video

CORPUS = ["a dog runs on the beach. a red square above a blue circle. write a short caption. describe this image."] * 20
START, END, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
VIT = {name: SIGLIP[name] for name in SIGLIP if name != "model_type"}
SIZE = {"height": 28, "width": 28}


@cache
def vocabulary(specials: tuple[str, ...]) -> str:
    """A byte-level BPE tokenizer as JSON, with PAD, START, END and `specials` as its first ids."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, START, END, *specials],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return core.to_str()


def tokenizer(*specials: str, **named: str) -> Any:
    """A tokenizer with these special tokens; `named` ones are also attributes, as `image_token`."""
    core = Tokenizer.from_str(vocabulary((*specials, *named.values())))
    return t.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens=named,
    )


def chat(image: str) -> str:
    return CHAT.replace("IMAGE", image)


def shaken(model: Any, seed: int = 0) -> Any:
    """The model with weights large enough that captions differ between images and have different lengths."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2.1 / parameter.shape[-1] ** 0.5)
    model.generation_config = t.GenerationConfig(
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=model.generation_config.decoder_start_token_id,
    )
    return model.eval()


Made = tuple[Any, Any]  # model and processor


def pil(name: str, **settings: Any) -> Any:
    """An image processor of transformers' PIL backend."""
    kind = getattr(t, f"{name}Pil", None) or getattr(t, name)
    return kind(**settings)


def llava() -> Made:
    words = tokenizer(image_token=IMAGE)
    config = t.LlavaConfig(
        vision_config=SIGLIP,
        text_config=LLAMA | {"vocab_size": len(words)},
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    processor = t.LlavaProcessor(
        image_processor=pil("SiglipImageProcessor", size=SIZE),
        tokenizer=words,
        patch_size=7,
        vision_feature_select_strategy="full",
        chat_template=chat(IMAGE),
        image_token=IMAGE,
    )
    return t.LlavaForConditionalGeneration(config), processor


def idefics3(kind: str) -> Made:
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    extra = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>", *rows)
    words = tokenizer(*extra, image_token=IMAGE)
    config: Any = getattr(t, f"{kind}Config")(
        vision_config=VIT,
        text_config=LLAMA | {"vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        scale_factor=2,
        pad_token_id=0,
    )
    images = pil(
        f"{kind}ImageProcessor",
        size={"longest_edge": 56},
        max_image_size={"longest_edge": 28},
        do_image_splitting=True,
    )
    named: dict[str, Any] = {
        "image_processor": images,
        "tokenizer": words,
        "image_seq_len": 4,
        "chat_template": chat(IMAGE),
    }
    processor = without_video(getattr(t, f"{kind}Processor"))(
        **named, **({"video_processor": None} if kind == "SmolVLM" else {})
    )
    return getattr(t, f"{kind}ForConditionalGeneration")(config), processor


def paligemma(kind: str) -> Made:
    words = tokenizer(image_token=IMAGE)
    images = pil("SiglipImageProcessor", size=SIZE, image_seq_length=16)
    images.image_seq_length = 16
    processor = t.PaliGemmaProcessor(images, words)
    text: dict[str, Any] = LLAMA | {"model_type": kind, "vocab_size": len(words)}
    if kind == "gemma2":
        text |= {"sliding_window": 14, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
    config = t.PaliGemmaConfig(
        vision_config=SIGLIP | {"projection_dim": 48, "vision_use_head": False},
        text_config=text,
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        projection_dim=48,
        hidden_size=48,
        tie_word_embeddings=False,
    )
    return t.PaliGemmaForConditionalGeneration(config), processor


def qwen(kind: str) -> Made:
    words = tokenizer("<|vision_start|>", "<|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>")
    ids = {
        f"{name}_token_id": words.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {name: value for name, value in LLAMA.items() if name != "model_type"} | {"vocab_size": len(words)}
    vision: dict[str, Any] = {
        "depth": 2,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if kind == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48}
    if kind == "Qwen2_5_VL":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if kind == "Qwen3VL":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        rope["mrope_interleaved"] = True
    if kind != "Qwen3VL":
        text.pop("head_dim")
    config = getattr(t, f"{kind}Config")(
        text_config=text | {"rope_parameters": rope}, vision_config=vision, tie_word_embeddings=False, **ids
    )
    images = pil("Qwen2VLImageProcessor", patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64})
    template = chat("<|vision_start|><|image_pad|><|vision_end|>")
    processor = without_video(getattr(t, f"{kind}Processor"))(images, words, chat_template=template)
    return getattr(t, f"{kind}ForConditionalGeneration")(config), processor


def gemma3() -> Made:
    words = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    config = t.Gemma3Config(
        vision_config=SIGLIP | {"vision_use_head": False},
        text_config={
            **LLAMA,
            "model_type": "gemma3_text",
            "vocab_size": len(words),
            "sliding_window": 14,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
    )
    images = pil("Gemma3ImageProcessor", size=SIZE)
    processor = t.Gemma3Processor(images, words, chat_template=chat("<start_of_image>"), image_seq_length=4)
    return t.Gemma3ForConditionalGeneration(config), processor


def internvl() -> Made:
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = t.InternVLConfig(
        vision_config={**VIT, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={**LLAMA, "model_type": "qwen2", "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = pil("GotOcr2ImageProcessor", size=SIZE, crop_to_patches=True, max_patches=4)
    template = chat("<IMG_CONTEXT>\n")
    processor = without_video(t.InternVLProcessor)(images, words, image_seq_length=4, chat_template=template)
    return t.InternVLForConditionalGeneration(config), processor


def onevision() -> Made:
    words = tokenizer(image_token=IMAGE, video_token="<video>")
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = t.LlavaOnevisionConfig(
        vision_config=SIGLIP | {"vision_use_head": False},
        text_config=LLAMA | {"model_type": "qwen2", "vocab_size": len(words)},
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    images = pil("LlavaOnevisionImageProcessor", size=SIZE, image_grid_pinpoints=pinpoints)
    processor = without_video(t.LlavaOnevisionProcessor)(
        images, words, num_image_tokens=16, vision_feature_select_strategy="full", chat_template=chat(IMAGE)
    )
    return t.LlavaOnevisionForConditionalGeneration(config), processor


QFORMER = {**VIT, "encoder_hidden_size": 32}
OPT = {
    "model_type": "opt",
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def blip2(kind: str) -> Made:
    words = tokenizer(IMAGE)
    config = getattr(t, f"{kind}Config")(
        vision_config=VIT,
        qformer_config=QFORMER | {"vocab_size": len(words)},
        text_config=OPT | {"vocab_size": len(words)},
        num_query_tokens=6,
        image_token_index=words.convert_tokens_to_ids(IMAGE),
    )
    images = pil("BlipImageProcessor", size=SIZE)
    named = {"num_query_tokens": 6}
    if kind == "Blip2":
        processor = t.Blip2Processor(images, words, **named)
    else:
        processor = t.InstructBlipProcessor(images, words, words, **named)
    return getattr(t, f"{kind}ForConditionalGeneration")(config), processor


def kosmos2() -> Made:
    tags = (
        "</doc>",
        "</image>",
        "</chunk>",
        "</line>",
        "<grounding>",
        "<phrase>",
        "</phrase>",
        "<object>",
        "</object>",
    )
    specials = (IMAGE, *tags, "</delimiter_of_multi_objects/>", *(f"<patch_index_{n:04}>" for n in range(1024)))
    words = tokenizer(*specials)
    config = t.Kosmos2Config(
        text_config={
            "vocab_size": len(words),
            "embed_dim": 48,
            "layers": 2,
            "ffn_dim": 96,
            "attention_heads": 4,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={**VIT, "model_type": "kosmos_2_vision_model"},
        latent_query_num=64,
    )
    images = pil("CLIPImageProcessor", size=SIZE, crop_size=SIZE)
    return t.Kosmos2ForConditionalGeneration(config), t.Kosmos2Processor(images, words)


def pix2struct() -> Made:
    words = tokenizer()
    config = t.Pix2StructConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 48,
            "d_kv": 8,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 6,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        vision_config={
            "hidden_size": 48,
            "patch_embed_hidden_size": 7 * 7 * 3,
            "d_ff": 64,
            "d_kv": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "seq_len": 2048,  # patches, which the processor pads to
        },
    )
    images = pil("Pix2StructImageProcessor", patch_size={"height": 7, "width": 7}, max_patches=16)
    return t.Pix2StructForConditionalGeneration(config), t.Pix2StructProcessor(images, words)


MODELS: Mapping[str, Callable[[], Made]] = {
    "llava": llava,
    "smolvlm": lambda: idefics3("SmolVLM"),
    "idefics3": lambda: idefics3("Idefics3"),
    "paligemma": lambda: paligemma("gemma"),
    "paligemma2": lambda: paligemma("gemma2"),
    "qwen2-vl": lambda: qwen("Qwen2VL"),
    "qwen2.5-vl": lambda: qwen("Qwen2_5_VL"),
    "qwen3-vl": lambda: qwen("Qwen3VL"),
    "gemma3": gemma3,
    "internvl": internvl,
    "llava-onevision": onevision,
    "blip-2": lambda: blip2("Blip2"),
    "instructblip": lambda: blip2("InstructBlip"),
    "kosmos-2": kosmos2,
    "pix2struct": pix2struct,
}


def save_vlm(folder: Path, name: str) -> Path:
    """Save a tiny checkpoint of one of MODELS to `folder`."""
    model, processor = MODELS[name]()
    shaken(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
