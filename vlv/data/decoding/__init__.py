"""What Pillow alone decodes wrongly or refuses: ICC profiles, TIFF layouts, PNG transparency, unfinished JPEG files."""
