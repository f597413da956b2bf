"""The tiny world: what it looks like, and how the family that shows it is trained."""
