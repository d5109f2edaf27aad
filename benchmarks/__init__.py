"""Measurements and the demo: everything here runs the two real processes."""
