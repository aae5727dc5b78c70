"""Captioning: the pipeline of `capcli caption`, the captioner, and the plan of a run."""
