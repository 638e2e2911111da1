"""`regrad doctor`: what is missing or odd on this machine, with the remedy. Each check is one small function."""
