"""Provide the layer groups of a language model as actors: embedding, blocks, head, or all of them in one."""
