"""From rows on disk to batches of token ids, on the host, in NumPy (no JAX in this room).

sources (rows) -> formats (conversations) -> chat (token ids + loss mask) -> tokenized (cached on disk) ->
split (held-out rows) -> packing (rows of fixed length) -> loader (seeded, sharded, resumable batches).
"""
