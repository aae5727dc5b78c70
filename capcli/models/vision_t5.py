"""Vision-T5: an image encoder and a T5 whose encoder reads the image and a question, and whose decoder generates the answer.

The image features and the question's embeddings each go through a linear projection to the T5's width and then, concatenated,
through the T5's encoder. T5's positions have one dimension, so image tokens also get sines and cosines of their row and column:
without them a small model takes long to learn left from right. The question's embeddings are the T5's own, or the output of a
second T5 encoder (`question_config`). For one short question, the same for every image, that encoder would add a third of the
weights for no benefit.

T5 counts positions itself when it has a cache, so its decoder's layers are called one by one, with the relative position bias
of each row's own ancestors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from capcli.models import modules
from capcli.models.encoders import (
    ANY_SIZE,
    feature_width,
    flatten_features,
    grid,
    image_size_of,
    position_features,
    register_architecture,
    sub_config,
)
from capcli.models.modules import split_heads

LOADER = "AutoModel"
ENCODER, DECODER = ("encoder", "question_encoder"), ("text_model",)
generation = modules.own_generation
QUESTION = "What does the image describe?"
POSITIONS = 512  # the most tokens of a caption, as a T5 has no limit of its own


class VisionT5Config(PretrainedConfig):  # type: ignore[no-untyped-call]
    """`vision_config` and `text_config` are the configs of the image encoder and the T5; `question_config` is that of a T5
    encoder for the question, None for none. `question` is the default question.
    """

    model_type = "vision-t5"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig, "question_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        question_config: dict[str, Any] | PretrainedConfig | None = None,
        question: str = QUESTION,
        **others: Any,
    ) -> None:
        self.vision_config, self.text_config = sub_config(vision_config, "swinv2"), sub_config(text_config, "t5")
        self.question_config = None if question_config is None else sub_config(question_config, "t5")
        self.question = question
        pad = self.text_config.pad_token_id
        start = getattr(self.text_config, "decoder_start_token_id", None)
        ids = {
            "pad_token_id": pad,
            "eos_token_id": self.text_config.eos_token_id,
            "decoder_start_token_id": pad if start is None else start,  # T5 starts with its padding token
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,  # for this class; the T5's own config decides whether its head is tied
        }
        super().__init__(**ids | others)


class VisionT5(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """An image encoder and a T5. `generate(pixel_values=..., input_ids=...)` answers a question with transformers' search."""

    config_class = VisionT5Config
    config: VisionT5Config
    main_input_name = "pixel_values"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keep_in_fp32_modules = ["wo"]  # noqa: RUF012  (as in T5: half precision overflows there)
    _tied_weights_keys = {  # noqa: RUF012
        f"text_model.{name}.weight": "text_model.shared.weight"
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    }

    def __init__(
        self,
        config: VisionT5Config,
        encoder: PreTrainedModel | None = None,
        text_model: T5ForConditionalGeneration | None = None,
        question_encoder: T5EncoderModel | None = None,
    ) -> None:
        super().__init__(config)
        auto, t5, reader = (cast("Any", kind) for kind in (AutoModel, T5ForConditionalGeneration, T5EncoderModel))
        self.encoder: Any = encoder or auto.from_config(config.vision_config)
        self.text_model: Any = text_model or t5(config.text_config)
        self.question_encoder: Any = question_encoder
        if question_encoder is None and config.question_config is not None:
            self.question_encoder = reader(config.question_config)
        # the configs of the given parts replace those in this config
        config.vision_config, config.text_config = self.encoder.config, self.text_model.config
        question_source = self.text_model.config
        if self.question_encoder is not None:
            question_source = config.question_config = self.question_encoder.config
        width = config.text_config.d_model
        self.image_projection = nn.Linear(feature_width(config.vision_config), width)
        self.question_projection = nn.Linear(question_source.d_model, width)
        head = self.text_model.lm_head.weight
        self.post_init()  # type: ignore[no-untyped-call]
        if text_model is not None:  # T5 v1.1 has a head that is not tied, but post_init() ties it
            text_model.lm_head.weight = head

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises the projections; the parts are initialised by their own classes.

        The image's projection gives features of deviation 1, like T5's embeddings; the question's is the identity.
        """
        if module is self.image_projection:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif module is self.question_projection:
            nn.init.eye_(module.weight)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.text_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.text_model.get_output_embeddings()
        return head

    def read_question(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """A question's ids [E, W] -> its embeddings in the T5's width [E, W, d_model]."""
        if self.question_encoder is None:
            text = self.get_input_embeddings()(input_ids)
        else:
            text = self.question_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        projected: Tensor = self.question_projection(text)
        return projected

    def read(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Images [E, 3, h, w] and questions [E, W] -> the T5 encoder's output [E, M + W, d_model], its mask."""
        features = self.encoder(pixel_values=pixel_values).last_hidden_state
        rows, columns = grid(self.config.vision_config, features, *pixel_values.shape[2:])
        image = self.image_projection(flatten_features(features))
        image = image + position_features(image, rows, columns)
        x = torch.cat((image, self.read_question(input_ids, attention_mask)), 1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask.new_ones(image.shape[:2]), attention_mask), 1)
        return self.text_model.encoder(inputs_embeds=x, attention_mask=attention_mask).last_hidden_state, attention_mask

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        **others: Any,
    ) -> Seq2SeqLMOutput:
        """Images [B, 3, h, w], questions [B, W] and their mask, decoder_input_ids [B, T] (start token first) -> logits [B, T, V].

        With `encoder_outputs`, the output of `read`, the mask is that of image and question together.
        """
        if encoder_outputs is None:
            assert pixel_values is not None
            assert input_ids is not None
            encoded, attention_mask = self.read(pixel_values, input_ids, attention_mask)
            encoder_outputs = BaseModelOutput(last_hidden_state=encoded)
        out: Seq2SeqLMOutput = self.text_model(
            encoder_outputs=encoder_outputs,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            **others,
        )
        return out

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> Any:
        """transformers' generate() for questions [E, W] about images [E, 3, h, w]; `others` are its arguments."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        encoded, mask = self.read(pixel_values, input_ids, attention_mask)
        outputs = BaseModelOutput(last_hidden_state=encoded)
        if (
            others.get("use_cache") is not False
        ):  # generate() itself would create a cache with the layers of the T5's encoder
            others.setdefault("past_key_values", EncoderDecoderCache(DynamicCache(), DynamicCache()))
        search: Any = super().generate  # type: ignore[misc]
        return search(encoder_outputs=outputs, attention_mask=mask, **others)


class Encode(modules.Encode):
    """Pixels and a question, both through the T5's encoder, to memory."""

    def __init__(self, model: nn.Module, rescale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        whole: Any = model
        super().__init__(whole.encoder, rescale, mean, std, size=image_size_of(whole.encoder.config))
        self.any_size = whole.encoder.config.model_type in ANY_SIZE
        self.whole = whole

    def forward(self, pixels: Tensor, encoder_ids: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """uint8 [E, h, w, 3] and the questions' ids [E, W] -> 2 x layers of [E, H, image tokens + W, D]."""
        return self.keys_values(self.whole.read(self.normalise(pixels), encoder_ids)[0])

    def keys_values(self, features: Tensor) -> tuple[Tensor, ...]:
        layers = [block.layer[1].EncDecAttention for block in self.whole.text_model.decoder.block]
        return tuple(
            split_heads(project(features), layer.n_heads) for layer in layers for project in (layer.k, layer.v)
        )


class Step(modules.Step):
    """One pass of the T5's decoder."""

    def __init__(self, model: nn.Module) -> None:
        whole: Any = model
        super().__init__(whole.text_model.decoder)
        config = whole.config.text_config
        self.head: nn.Module = whole.text_model.lm_head
        self.scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        self.positions, self.vocabulary = getattr(config, "n_positions", POSITIONS), config.vocab_size
        self.bias = nn.Buffer(bias_by_distance(self.decoder), persistent=False)  # [distances, H]

    def decode(self, tokens: Tensor, position: Tensor, visible: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """A row's visible entries are in the order of their positions, so counting them gives each entry's position."""
        entry = visible.long().cumsum(-1) - 1  # [S, Q, N]
        away = (position[..., None] - entry).clamp(0, len(self.bias) - 1)
        bias = nn.functional.embedding(away, self.bias).permute(0, 3, 1, 2)  # [S, H, Q, N]
        hidden = bias.new_full((), torch.finfo(bias.dtype).min)
        return self.logits(tokens, position, torch.where(visible[:, None], bias, hidden), cache)

    def logits(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: EncoderDecoderCache) -> Tensor:  # noqa: ARG002
        """Here the mask is [S, H, Q, N] and contains the relative position bias."""
        decoder: Any = self.decoder
        cross: Any = cache.cross_attention_cache.layers[0]
        x = decoder.embed_tokens(tokens)
        none = x.new_zeros(1, 1, 1, 1)  # otherwise every layer would add a position bias of its own
        for block in decoder.block:
            # only the presence of the cross layers' keys is used: they are filled
            x = block(x, mask, none, cross.keys[:, 0], None, none, past_key_values=cache)[0]
        logits: Tensor = self.head(decoder.final_layer_norm(x) * self.scale)
        return logits


@torch.no_grad()
def bias_by_distance(decoder: Any) -> Tensor:
    """The decoder's relative position bias [distances, H] for keys 0, 1, ... positions back; constant from the last on."""
    attention = decoder.block[0].layer[0].SelfAttention
    weight: Tensor = attention.relative_attention_bias.weight
    back = torch.arange(attention.relative_attention_max_distance + 1, device=weight.device)
    bucket = attention._relative_position_bucket(  # noqa: SLF001
        -back,
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return weight[bucket].clone()


def inputs(_model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The forward's arguments."""
    ids = batch["encoder_ids"]
    return {
        "pixel_values": batch["pixel_values"],
        "input_ids": ids.clamp(min=0),
        "attention_mask": (ids >= 0).long(),
        "decoder_input_ids": batch["decoder_input_ids"],
        "use_cache": False,
    }


def encoder_prompt(config: Mapping[str, Any], tokenizer: Any, prompt: str | None) -> list[int]:
    """The ids of a question and T5's end token; `<extra_id_0>` and so on in it are the gaps to fill."""
    ids: list[int] = tokenizer(prompt or config.get("question") or QUESTION, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


register_architecture(VisionT5Config, VisionT5)


def prompt_inputs(config: Any, tokenizer: Any, prompt: str | None, _size: tuple[int, int]) -> dict[str, list[int]]:
    """The question for `generate()`."""
    return {"input_ids": encoder_prompt(config.to_dict(), tokenizer, prompt)}
