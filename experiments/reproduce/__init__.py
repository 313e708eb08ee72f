"""The tables of the papers: one module for each."""
