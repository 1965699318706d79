"""The training half: needs PyTorch, Lightning, torchvision and timm (extra ``train``)."""
