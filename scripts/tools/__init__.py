"""Other tools that load a deployed folder: each one's program, its environment, and what its numbers are held against.

``given.py`` and the programs ``in_*`` run in the tools' own environments, which have nothing of this package.
"""
