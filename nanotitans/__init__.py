"""What the files at the top share."""
