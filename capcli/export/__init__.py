"""A captioner -> an engine: its graphs, and the proof that they say the same."""
