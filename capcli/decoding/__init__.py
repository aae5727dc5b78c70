"""The decode core: slots and their shapes, search (with constraints and sampling noise), and the loop that runs both."""
