"""The contract between the screen and the engine, and the record of every run.

Pure data and pure functions, plus the store. This package imports neither ``app`` nor
``workers`` nor torch, so both sides (and a notebook) can use it.
"""

__version__ = "0.1.0"
