"""ReGrad in frameworks: retrievers, chat models and a vector store. Each module needs the extra of its name."""
