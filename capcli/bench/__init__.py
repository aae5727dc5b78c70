"""`capcli bench`: how fast captions are made here, where the time goes, how far the ceiling is, and beside whom."""
