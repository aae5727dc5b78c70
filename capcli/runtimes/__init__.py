"""The runtimes, which execute encode and step."""
