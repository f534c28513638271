"""Retrieval: an index of vectors that is searched exhaustively, filtered per query and updated while it is searched."""
