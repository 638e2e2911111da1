"""The truth of a bank: documents, versions, namespaces, sequence numbers."""
