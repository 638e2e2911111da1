"""Checked values and the contracts of what a bank is given: documents, filters, settings, encoder, embedder."""
