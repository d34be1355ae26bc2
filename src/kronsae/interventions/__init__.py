"""Interventions on latents in a running language model, and attribution of its output to latents."""
