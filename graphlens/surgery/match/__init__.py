"""Finds the hook points, weights and architecture in a transformer's graph that graphlens did not export."""
