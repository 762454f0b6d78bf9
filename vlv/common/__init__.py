"""Tools that every package shares: commands, files, pages. Imports nothing heavy."""
