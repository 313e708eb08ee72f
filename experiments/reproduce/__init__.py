"""The tables of the papers: one module a paper, with one shared runner."""
