"""Evaluation of SAEs: reconstruction, spliced language-model loss, and latents with text examples."""

from kronsae.eval.contexts import Band, Context, Gallery, ShownHead, ShownLatent, ShownParent
from kronsae.eval.evaluation import Evaluation, Hooks, evaluate
from kronsae.eval.language_model import Skipped, SplicedModel, spliced_models
from kronsae.eval.latents import GalleryConfig, LatentStatistics, latent_statistics
from kronsae.eval.profiles import PreLatentMeter, Profile, ProfileMeter, ProfileSummary
from kronsae.eval.reconstruction import Reconstruction, reconstruction

__all__ = [
    "Band",
    "Context",
    "Evaluation",
    "Gallery",
    "GalleryConfig",
    "Hooks",
    "LatentStatistics",
    "PreLatentMeter",
    "Profile",
    "ProfileMeter",
    "ProfileSummary",
    "Reconstruction",
    "ShownHead",
    "ShownLatent",
    "ShownParent",
    "Skipped",
    "SplicedModel",
    "evaluate",
    "latent_statistics",
    "reconstruction",
    "spliced_models",
]
