"""Captioning: the pipeline of `capcli caption`, the captioner, and the choices made before the first image."""
