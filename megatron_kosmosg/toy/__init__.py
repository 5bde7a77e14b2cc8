"""The toy world: embedded pictures and captions, a small trained model, and a judge of images."""
