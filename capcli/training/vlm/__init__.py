"""Training of adapters for vision-language models: chat-formatted captions, images as the processor makes them."""
