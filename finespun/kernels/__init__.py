"""Hot loops: plain PyTorch, one file per operation."""
