"""The output of a training run: folder, history, curves, model card, live view."""
