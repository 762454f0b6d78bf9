"""Where captions are written: JSON lines, text files, COCO, Parquet, WebDataset."""
