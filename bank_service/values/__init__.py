"""Checked values (documents, filters, settings), and the contracts of the encoder and the embedder."""
