"""The field's benchmarks: prompts fetched, pictures laid out for their scorers, which are run.

No prompt or scorer of theirs lies here, and no score is computed: their own programs do that.
"""
