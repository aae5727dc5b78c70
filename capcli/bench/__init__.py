"""`capcli bench`: how fast images are captioned, by stage, relative to the hardware's limit and to baselines."""
