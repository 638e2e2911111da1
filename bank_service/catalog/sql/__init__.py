"""The tables, writes and reads of every catalog in SQL. ``sqlite`` and ``postgres`` add their own."""
