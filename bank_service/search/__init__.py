"""How a query is answered. A room of one request, read in this order.

1. ``queries.Queries`` takes the query and its vector. It waits until the vectors reflect every acknowledged change.
2. ``present.Present`` finds documents as they are now, in one view of the catalog. ``past.Past`` finds them as they
   were at an earlier sequence.
3. Both ask ``nearest.Nearest`` for keys, the contract of a vector store. ``usearch`` has the vectors in the bank's
   process. ``catalog_nearest`` asks a catalog that has them itself.
4. ``Present`` also asks ``WordSearch`` for the best documents by words. The catalog implements it.
5. ``ranking`` compares the candidates by the catalog's own vectors, which decide the order and the scores.

``batch`` answers several queries in one message.
"""
