"""SAE mathematics: encoders, gates, sparsifiers, decoders, objective, metrics, FLOPs and checkpoints."""
