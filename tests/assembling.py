"""For tests of assembled captioners: tiny encoders and decoders with and without weights, and tokenizers of every kind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from captioners import decoder_config, encoder_config
from running import PROCESSOR
from tokenizers import ByteLevelBPETokenizer

from capcli.options import GenerationOptions, ModelOptions
from capcli.training.model.assembly import AssembledCaptioner, assemble

RINNA = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "rinna-japanese-gpt2"
CAPTIONS = [
    "a black dog runs along the beach",
    "two dogs are running on the sand",
    "a man in a red shirt rides a bike",
    "the man is riding his bicycle down a hill",
    "a child plays with a ball in the park",
    "children are playing in the water",
    "a girl in a blue dress jumps over the puddle",
    "the brown dog catches a ball in its mouth",
    "一只黑色的狗在沙滩上奔跑",
    "一个男孩在公园里踢球",
] * 4
VIT = {
    "model_type": "vit",
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
BERT = {
    "model_type": "bert",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
ROBERTA = BERT | {"model_type": "roberta"}
BART = {"model_type": "bart", "d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
BART |= {"max_position_embeddings": 64}
TABLES = {  # of each kind of decoder
    "gpt2": GPT2,
    "bert": BERT,
    **{kind: ROBERTA | {"model_type": kind} for kind in ("roberta", "xlm-roberta")},
    **{kind: BART | {"model_type": kind} for kind in ("bart", "mbart", "trocr")},
}
PUBLISHED: dict[str, Any] = {  # the classes that encoders and decoders are published as
    "vit": transformers.ViTForImageClassification,
    "deit": transformers.DeiTForImageClassification,
    "beit": transformers.BeitForImageClassification,
    "swin": transformers.SwinForImageClassification,
    "swinv2": transformers.Swinv2ForImageClassification,
    "donut-swin": transformers.DonutSwinForImageClassification,
    "clip_vision_model": transformers.CLIPModel,
    "siglip_vision_model": transformers.SiglipModel,
    "dinov2": transformers.Dinov2ForImageClassification,
    "dinov2_with_registers": transformers.Dinov2WithRegistersForImageClassification,
    "gpt2": transformers.GPT2LMHeadModel,
    "bert": transformers.BertForMaskedLM,
    "roberta": transformers.RobertaForMaskedLM,
    "xlm-roberta": transformers.XLMRobertaForMaskedLM,
    "bart": transformers.BartForConditionalGeneration,
    "mbart": transformers.MBartForConditionalGeneration,
    "trocr": transformers.TrOCRForCausalLM,
}
TEXT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def new(
    *, captions: Iterable[str] = CAPTIONS, generation: GenerationOptions | None = None, seed: int = 0, **options: Any
) -> AssembledCaptioner:
    """An untrained captioner: by default a tiny ViT and GPT-2 with a new tokenizer."""
    if "model" not in options:
        options = {"encoder": VIT, "decoder": GPT2, "tokenizer": "new", "vocab_size": 320, "max_length": 40} | options
    return assemble(ModelOptions(**options), lambda: captions, generation or GenerationOptions(), seed)


def save_encoder(folder: Path, kind: str = "vit", **processor: Any) -> Any:
    """Saves an encoder in the form in which it is published, such as a classifier, with its image processor.

    Returns the encoder.
    """
    torch.manual_seed(11)
    published, config = PUBLISHED[kind], encoder_config(kind)
    if published.config_class is not type(config):  # a model of image and text
        config = published.config_class(text_config=TEXT, vision_config=config.to_dict())
    model = published(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PROCESSOR | processor)
    return getattr(model, "vision_model", None) or model.base_model


def save_decoder(folder: Path, kind: str = "gpt2", *, vocabulary: int = 120) -> Any:
    """Saves a language model as it is published, without a tokenizer; only BARTs have cross-attention."""
    torch.manual_seed(12)
    sizes = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48} if "bart" in kind else {}
    config = decoder_config(kind, 48, vocabulary, add_cross_attention=False, is_decoder=kind == "gpt2", **sizes)
    model = PUBLISHED[kind](config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return model


def save_characters(folder: Path) -> Path:
    """Saves a BERT vocabulary of characters, such as Chinese GPT-2s have: only a vocab.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted({letter for caption in CAPTIONS for letter in caption if not letter.isspace()})
    continued = [f"##{letter}" for letter in letters if letter.isascii()]
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *continued]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def save_bytes(folder: Path) -> Path:
    """Saves a byte-level BPE such as GPT-2's: vocab.json and merges.txt; <|endoftext|> is start, end and padding."""
    folder.mkdir(parents=True, exist_ok=True)
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(CAPTIONS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    core.save_model(str(folder))
    return folder


def save_pieces(folder: Path, captions: Iterable[str] = CAPTIONS, **settings: Any) -> Any:
    """Saves a SentencePiece model trained on the captions; returns its SentencePieceProcessor."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"vocab_size": 140, "model_type": "unigram", "hard_vocab_limit": False, "minloglevel": 2} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_prefix=str(folder / "spiece"), **settings
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))


def write_json(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path
