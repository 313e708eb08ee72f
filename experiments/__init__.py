"""What a researcher runs on top of the algorithms."""
