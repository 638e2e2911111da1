"""A vector store in the bank's process, on usearch. Another store would replace this room.

``usearch_nearest`` implements the contract ``search.nearest``. Behind it: ``usearch_index`` has a ``graph`` for each
namespace and their snapshot on disk. ``crowds`` has the near-equal vectors that a graph leaves out. ``exact_vectors``
compares every vector of a small namespace. ``index_follower`` applies the catalog's changes, and ``compaction`` frees
the memory of removed vectors.
"""
