"""Architecture only: what is computed from what. No stages, losses, optimizers or files of a run.

Dimension letters: s sequence, b micro-batch, h hidden, n images, p patches, q latent queries,
v vocabulary, c condition positions, d text-encoder width, tp tensor-parallel shards.
"""
