"""Small modules without a room's knowledge, which every room may import."""
