"""The host side of a run: command line, rows, compiled program, run directory, logs, reports."""

from algos.launch.cli import config_for
from algos.launch.session import main

__all__ = ["config_for", "main"]
