"""The device: owns the pictures, runs the head, sends activations and trains on the gradients that return."""
