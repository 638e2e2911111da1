"""Which documents a query is about: by vector, by words, now and in the past."""
