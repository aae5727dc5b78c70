"""Assembling the captioner to train: pretrained parts, tokenizer, embeddings, generation settings."""
