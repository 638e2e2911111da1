"""Snapshots of a whole bank, and how one becomes a bank again."""
