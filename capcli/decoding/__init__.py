"""The decode core: who sits where (slots), what is said next (search, constraints, noise), and the loop that runs both."""
