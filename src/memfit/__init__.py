"""memfit trains the whole model in the memory you have."""
