"""The bank's gRPC server: its methods, messages, permissions and limits."""
