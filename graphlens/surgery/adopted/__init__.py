"""From a matched graph of another exporter to a hooked one: weights in a file of ours, named hook points, optional inputs."""
