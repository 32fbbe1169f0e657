"""What the systems share: inner and outer loops, trajectories, training, evaluation. It knows no system by name."""
