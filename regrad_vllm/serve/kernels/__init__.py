"""The loops that add φ* and the documents of each row to a layer's output. This room imports neither vLLM nor gRPC."""
