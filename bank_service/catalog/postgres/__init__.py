"""The catalog in PostgreSQL with pgvector: documents, vectors and words. One bank at a time has it."""
