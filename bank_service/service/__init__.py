"""gRPC in front of the bank: server, messages, who may do what, how much at once."""
