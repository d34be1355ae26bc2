"""Change latents in a running language model, and attribute its output to them."""
