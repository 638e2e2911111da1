"""The catalog in PostgreSQL with pgvector: documents, vectors and words."""
