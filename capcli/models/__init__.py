"""Captioners: their files, and one module per family with its encode and step."""
