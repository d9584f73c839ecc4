"""From a recipe to a trained adapter, and back to a model that uses it."""
