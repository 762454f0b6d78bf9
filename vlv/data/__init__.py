"""Images, synthetic scenes, and training data from folders, tars, Parquet and object stores."""
