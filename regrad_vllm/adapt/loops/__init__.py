"""The compiled loops: composing into a slot, and applying each row's own adapter. By numba."""
