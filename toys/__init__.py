"""Toy experiments: targets whose teachers are exact, and students that train on a laptop."""
