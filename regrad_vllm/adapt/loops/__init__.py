"""Loops compiled by numba: one composes an adapter into a slot, the other applies each row's own adapter."""
