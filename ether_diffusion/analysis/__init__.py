"""What adapters do to the weights of a base: distances, hyperspherical energy, and how much a base bears."""
