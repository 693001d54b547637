"""What every package of the toolkit stands on: errors and the frame of a command. Imports nothing heavy."""

__version__ = "0.2.0"
