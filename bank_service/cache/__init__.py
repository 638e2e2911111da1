"""Hot gradient records: the contract of a cache, Redis, and the Redis-compatible server that a bank starts itself."""
