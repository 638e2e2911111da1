"""The benchmark of several bank nodes."""
