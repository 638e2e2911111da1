"""The process: threads, background work, metrics, the data folder, libraries that must load in order."""
