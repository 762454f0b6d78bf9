"""The HTML report of the results."""
