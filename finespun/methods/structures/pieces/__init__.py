"""What several structures are made of."""
