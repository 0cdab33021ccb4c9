"""The layer groups of a causal model as actors: embedding, blocks, head, or all of them in one."""
