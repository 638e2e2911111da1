"""Hot gradient records in Redis, and the Redis-compatible server that a bank starts for itself."""
