"""Embeddings: from images and texts to vectors, shard by shard, for all stages."""
