"""Hold the page at `/`: markup, style, script, and the module that joins them."""
