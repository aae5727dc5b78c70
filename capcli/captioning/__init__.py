"""The caption run: pipeline, captioner, and what a run decides before its first image."""
