"""Classifiers: CIFAR forms of the usual networks, any timm or torchvision name, and their checkpoints."""
