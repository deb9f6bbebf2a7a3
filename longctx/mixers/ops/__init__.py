"""What mixers compute with: states along the sequence, in chunks and over ranks, each beside its naive form."""
