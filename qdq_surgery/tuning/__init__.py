"""From a target's rules to a model's own: the ranges, scales and grids that keep its output best."""
