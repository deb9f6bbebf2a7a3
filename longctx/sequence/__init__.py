"""How one sequence lies on many ranks and how it moves."""
