"""Process start under any launcher and the mesh of ranks."""
