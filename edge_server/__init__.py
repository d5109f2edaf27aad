"""The edge server: owns the recipe, runs the tail, returns gradients, moves both sides through the phases."""

import os

# gRPC reads it when it is imported: what it would print of a handshake that failed is no matter of the operator's.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
