"""Tools for our own measurements and training runs. Users don't need them."""
