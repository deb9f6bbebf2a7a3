"""Side-by-side measurements: ratios of medians, measured in turns; results as a table and JSON."""
