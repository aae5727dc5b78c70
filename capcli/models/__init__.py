"""Captioners: where their files come from, and one file per family with its encode and step."""
