"""What several dynamics are made of."""
