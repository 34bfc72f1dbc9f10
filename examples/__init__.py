"""Applications built on eskernel, as a user would build them."""
