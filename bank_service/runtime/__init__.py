"""The process: ownership, holds, locks, wake-ups, threads, background work, metrics, libraries that load in order."""
