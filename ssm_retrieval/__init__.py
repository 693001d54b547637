"""What every package of the toolkit stands on: errors and the frame of a command. Imports nothing heavy."""
