"""Tasks for the memory: rows of tokens, and how much each token counts as a target."""
