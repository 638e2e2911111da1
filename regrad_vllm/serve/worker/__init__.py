"""The part of the plugin in vLLM's workers: the pool of documents, the door to it, and the steps that use it."""
