"""What is learned: examples, tokens, answers, metrics."""
