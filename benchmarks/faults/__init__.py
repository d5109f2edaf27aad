"""Faults on purpose: a proxy that breaks the link, a rig that kills processes, and what the run must come to anyway."""
