"""The recipe: its sections, the rules across them, how it is read from YAML.

Needs no torch; says what a setting means, never what is done with it.
"""
