"""The command line: one module a command. Importing it loads nothing heavy."""

from .main import main

__all__ = ["main"]
