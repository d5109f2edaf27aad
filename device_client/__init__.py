"""The device: owns the pictures, runs the head, sends activations and trains on the gradients that return."""

import os

# gRPC reads it when it is imported: what it would print of a failed handshake is told in words of our own.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
