"""How the shipped model is trained: words, packed pages, eyes, then both together."""
