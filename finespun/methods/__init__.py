"""All methods, an axis a folder: mathematics that knows no model, file or run."""
