"""The mathematics of SAEs: encoders, gates, sparsifiers, decoders, the objective, metrics, FLOPs, saving."""
