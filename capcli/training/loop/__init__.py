"""The training loop: trainer, loss, validation, callbacks."""
