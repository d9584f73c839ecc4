"""All methods, an axis a folder: mathematics, independent of models, files and runs."""
