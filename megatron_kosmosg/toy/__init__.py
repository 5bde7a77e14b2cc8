"""The toy world: embedded images and captions, a small trained model, and its evaluator."""
