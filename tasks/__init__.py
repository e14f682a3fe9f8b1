"""What is made up to be remembered: rows of tokens, and how much each counts as a target."""
