"""PEFT's folders: read, and written as LoRA."""
