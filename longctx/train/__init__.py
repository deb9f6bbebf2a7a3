"""The training step, its engines, and callbacks for everything else."""
