"""Other people's networks: torchvision's and timm's, traced, resized, trained, saved and loaded."""
