"""A bank and a server as child processes on this machine, for the demo, the evaluation and the tests."""
