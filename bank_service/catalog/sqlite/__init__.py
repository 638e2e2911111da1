"""The catalog in one SQLite file, with words (FTS5) and metadata beside the documents."""
