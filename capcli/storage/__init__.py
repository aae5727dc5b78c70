"""Files on disk: atomic writes, locks, and the run file."""
