"""Scores of queries against a corpus, tile by tile, and their order."""
