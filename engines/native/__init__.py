"""The shelf: a decoder layer with an explicit forward and backward over an ops table, and what it needs around it."""
