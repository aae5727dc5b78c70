"""Assembling the captioner to train: pretrained parts, tokenizers, embeddings."""
