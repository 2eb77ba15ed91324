"""The command line: one module a command, with its options beside what it does. Importing it loads nothing heavy."""

from .main import main, run_quietly, run_script

__all__ = ["main", "run_quietly", "run_script"]
