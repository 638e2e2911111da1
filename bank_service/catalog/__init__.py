"""The truth of a bank: documents, their versions, namespaces and sequence numbers.

``contract`` says what every catalog does, ``entries`` has its values, ``factory`` opens one. ``sqlite`` is the only
implementation.
"""
