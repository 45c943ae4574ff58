"""Training: programs made of a network, a loss and an optimizer, and the loop that runs them."""
