"""What a launch would need and how fast it would be, worked out without devices or weights."""
