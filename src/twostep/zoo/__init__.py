"""The models and recipes inside the package, by name (`zoo:NAME`).

Weights and YAML only: no code but the names, and a student's own pipeline.py.
"""
