"""An encoder and a GPT-2, joined so that the image stands before the words."""

from __future__ import annotations

from capcli.errors import UsageError
from capcli.models.checkpoint import quiet_transformers
from capcli.models.prefix import PrefixCaptioner, PrefixConfig
from capcli.options import ModelOptions
from capcli.options.train import IMAGE_TOKENS
from capcli.training.model.join_cross_attention import both_parts
from capcli.training.model.joining import Joined, Parts
from capcli.training.model.pretrained import Config, config_of, seeded

FAMILY, ASKED = PrefixConfig.model_type, False


def any_size(encoder: Config) -> bool:  # noqa: ARG001
    return True


def room(decoder: Config, options: ModelOptions) -> int:
    """Raises UsageError where image and tags leave none for words, or not as many as were asked for."""
    holds: int = config_of(decoder).n_positions
    image, tags = before(options)
    if image + tags >= holds:
        raise UsageError(f"{image} image tokens and {tags} of tags leave no room for words: the decoder holds {holds}")
    left = holds - image - tags
    if options.max_length is not None and options.max_length > left:
        raise UsageError(
            f"--max-length is {options.max_length}, but {decoder.title} holds {holds} tokens, and {image} image tokens and "
            f"{tags} of tags leave {left}: give {left} or less, or fewer of those"
        )
    return left


def before(options: ModelOptions) -> tuple[int, int]:
    """How many tokens of the image and of tags stand before the words."""
    return options.image_tokens or IMAGE_TOKENS, options.tag_tokens or 0


def join(parts: Parts) -> Joined:
    encoder, decoder, new = both_parts(parts, cross=False)
    with seeded(parts.seed, "projection"), quiet_transformers():
        config = PrefixConfig(encoder.config.to_dict(), decoder.config.to_dict(), *before(parts.options))
        return Joined(PrefixCaptioner(config, encoder, decoder), parts.specials, new)
