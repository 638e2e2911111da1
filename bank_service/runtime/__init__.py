"""Tools of the process: ownership, holds, locks, wake-ups, threads, background work, metrics, and import order."""
