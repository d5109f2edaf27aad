"""What the device and the server share; imports neither side."""
