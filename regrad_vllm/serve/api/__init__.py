"""The plugin in vLLM's API server: from a request's body to its documents in the workers, and the answer."""
