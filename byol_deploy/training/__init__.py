"""Training: the BYOL module, its parts, its data and its loop. Needs PyTorch; knows no export format."""
