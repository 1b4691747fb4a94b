"""Teachers: bi-encoder, cross-encoder, late interaction, BM25, and weighted sets of them."""
