"""Tests of the bank, over a real gRPC server."""
