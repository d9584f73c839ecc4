"""What several starts are made of."""
