"""The catalog of a bank: documents, their versions, namespaces and sequence numbers. All other stores derive from it.

``contract`` has the interface, ``entries`` its values, and ``factory`` opens a catalog. ``sqlite`` is the only
implementation.
"""
