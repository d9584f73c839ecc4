"""What is done with an adapter after training."""
