"""Algorithms of PurePO, one per file."""
