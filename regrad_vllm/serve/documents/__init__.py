"""Documents over HTTP: routes to store, read, list, delete and search them, beside vLLM's own routes."""
