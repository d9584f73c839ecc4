"""LoRA files of diffusers and of kohya's scripts."""
