"""The chain rule as a transformation of graphs."""
