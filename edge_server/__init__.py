"""The edge server: owns the recipe, runs the tail, returns gradients, moves both sides through the phases."""
