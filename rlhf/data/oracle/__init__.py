"""A made-up world in which the true reward is known."""
