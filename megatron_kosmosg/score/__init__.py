"""The condition's way to the frozen U-Net's loss and back, beside the decoder or on other ranks."""
