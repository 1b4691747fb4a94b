"""Quantization, checks of exported graphs, and the search for an architecture."""
