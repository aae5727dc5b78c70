"""Training data: images and captions as pairs, masked captions, several tasks."""
