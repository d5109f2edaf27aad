"""What the device and the server share; imports neither side."""

import os

# gRPC reads these when it is imported, which both sides do by modules of this package. What it would print itself of a
# handshake that failed is told in words of our own, or no matter of the operator's.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# It asks name servers itself, and knows neither a home network's .local names nor what else the system looks in.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
