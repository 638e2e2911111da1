"""All uses of vLLM that are not its public API: what is replaced and what is read, with the versions."""
