"""Analyses of adapters: distances, hyperspherical energy, perturbations of a base, and cost."""
