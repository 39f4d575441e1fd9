"""What a turn minimises: roles, batches, terms, the turns of score, critic and student.

The only place that combines losses; no optimizer, no file.
"""
