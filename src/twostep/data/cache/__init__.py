"""The teacher's images: what a cache must hold, its files, building and reading it.

Shards are checked wherever they are read; nothing here knows a student.
"""
