"""What a training run leaves: folder, history, curves, model card, live view."""
