"""studies: whole experiments, each from its data to its table."""
