"""The gradient bank: documents in, gradients out."""

__version__ = "0.1.0"
