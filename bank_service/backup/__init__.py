"""Writes snapshots of a whole bank, and restores a bank from one."""
