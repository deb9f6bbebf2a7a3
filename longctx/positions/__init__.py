"""Position encodings as functions of global positions and global length."""
