"""An adapter without a model."""
