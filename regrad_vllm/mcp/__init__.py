"""A bank and a ReGrad server as tools of the Model Context Protocol, for `regrad mcp`."""
