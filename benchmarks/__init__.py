"""Side-by-side measurements against PEFT: `python -m benchmarks`, or one of its modules."""
