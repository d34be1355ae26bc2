"""Our transcoders inside circuit-tracer (optional: ``pip install circuit-tracer``), whatever their architecture.

circuit-tracer attributes along a linear function of the input per active latent: the row of ``W_enc``. A latent of a
Kronecker encoder, ``z = gate(u, v)``, has another such function on each token, its gradient
``dz/dx = dz/du P[h, i] + dz/dv Q[h, j]``. For mAND and the minimum, which are homogeneous of degree 1, Euler's
identity makes it complete, as for a dense encoder: ``z = dz/dx . x + dz/du b_P + dz/dv b_Q``. circuit-tracer asks for
one encoder vector per active latent *and token*, so this needs no change there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kronsae.core.encoders import DenseEncoder, KroneckerEncoder
from kronsae.core.sae import SAE
from kronsae.core.sparsifiers import JumpReLU
from kronsae.interop.circuit_tracer_export import INPUT_HOOK, OUTPUT_HOOK
from kronsae.support.errors import UserError


def transcoder_set(
    saes: Mapping[int, SAE],
    *,
    feature_input_hook: str = INPUT_HOOK,
    feature_output_hook: str = OUTPUT_HOOK,
    scan: str | None = None,
) -> Any:
    """Return a ``circuit_tracer.transcoder.TranscoderSet`` of our transcoders, for its replacement models.

    Args:
        saes: a transcoder of the MLP for every layer of the model, by layer; all of one ``d_sae``.
        feature_input_hook, feature_output_hook: hooks that they read and write, as circuit-tracer names them.
        scan: name of the set in its graphs.

    Raises:
        UserError: circuit-tracer is not installed, a layer is missing, or an SAE is not a transcoder with one encoder.
    """
    if importlib.util.find_spec("circuit_tracer") is None:
        raise UserError(
            "circuit-tracer must be installed; it was not found. Install it with: pip install circuit-tracer."
        )
    if sorted(saes) != list(range(len(saes))) or len({sae.d_sae for sae in saes.values()}) > 1:
        sizes = ", ".join(f"{layer}: {saes[layer].d_sae}" for layer in sorted(saes))
        raise UserError(
            f"saes must hold a transcoder for each layer from 0 on, all of one d_sae; got layers and sizes {sizes}."
        )
    from circuit_tracer.transcoder import TranscoderSet

    layers = {layer: LayerTranscoder(sae, layer) for layer, sae in saes.items()}
    return TranscoderSet(layers, feature_input_hook, feature_output_hook, scan)


class LayerTranscoder(nn.Module):
    """One of our transcoders with the interface of ``circuit_tracer.transcoder.SingleLayerTranscoder``.

    Args:
        sae: a transcoder or skip transcoder with a dense or a Kronecker encoder, whose d_out is d_in.
        layer: the layer whose MLP it imitates.

    Raises:
        UserError: another kind of SAE.
    """

    def __init__(self, sae: SAE, layer: int) -> None:
        super().__init__()
        config = sae.config
        whole = config.role in ("transcoder", "skip_transcoder") and config.d_in == config.d_out
        null = isinstance(sae.encoder, KroneckerEncoder) and sae.encoder.null_symbols
        fits = isinstance(sae.encoder, DenseEncoder | KroneckerEncoder) and not null and config.pursuit is None
        if not whole or not fits:
            raise UserError(
                f"saes must be transcoders with d_out = d_in, a dense or a Kronecker encoder, no null symbols and no "
                f"pursuit; got a {config.architecture} for layer {layer}{' with null symbols' if null else ''}."
            )
        self.sae, self.layer_idx = sae, layer
        self.d_model, self.d_transcoder = sae.d_in, sae.d_sae

    @property
    def W_dec(self) -> Float[Tensor, "F D"]:
        """Dictionary."""
        return self.sae.W_dec

    @property
    def b_dec(self) -> Float[Tensor, " D"]:
        """Bias of the decoder."""
        return self.sae.b_dec

    @property
    def W_skip(self) -> Float[Tensor, "D D"] | None:
        """Weights of the skip connection; None: there is none."""
        return None if self.sae.skip is None else self.sae.skip.W_skip

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.sae.W_dec.dtype

    def activation_function(self, latents: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
        """Return the latents that the sparsifier keeps, of all latents before it; the others become 0."""
        sparsifier = self.sae.sparsifier
        if isinstance(sparsifier, JumpReLU):
            return torch.where(latents > sparsifier.threshold, latents, 0.0)
        values, indices = latents.topk(self.sae.config.sparsifier.k)
        return torch.zeros_like(latents).scatter(-1, indices, values.relu())

    def encode(self, input_acts: Float[Tensor, "... D"], apply_activation_function: bool = True) -> Tensor:
        """Return dense codes ``[..., d_sae]``, or all latents before the sparsifier."""
        x = input_acts.to(self.dtype)
        if apply_activation_function:
            return self.sae.encode(x).to_dense()
        latents: Tensor = self.sae.encoder(x.reshape(-1, self.d_model)).materialize()
        return latents.reshape(*x.shape[:-1], self.d_transcoder)

    def decode(self, acts: Float[Tensor, "... F"], input_acts: Float[Tensor, "... D"] | None = None) -> Tensor:
        """Return the reconstruction of dense codes."""
        return acts @ self.W_dec + self.b_dec + self._skipped(input_acts)

    def compute_skip(self, input_acts: Float[Tensor, "... D"]) -> Tensor:
        """Return ``W_skip x``."""
        if self.W_skip is None:
            raise ValueError("Transcoder has no skip connection")
        return input_acts @ self.W_skip.T

    def forward(self, input_acts: Float[Tensor, "... D"]) -> Tensor:
        """Return what imitates the MLP's output."""
        found: Tensor = self.sae(input_acts.to(self.dtype))
        return found

    def encode_sparse(
        self, input_acts: Float[Tensor, "T D"], zero_positions: slice = slice(0, 1)
    ) -> tuple[Tensor, Float[Tensor, "A D"]]:
        """Return sparse codes ``[T, d_sae]`` without those at ``zero_positions``, and each one's encoder vector."""
        acts = self.encode(input_acts).detach()
        acts[zero_positions] = 0
        sparse = acts.to_sparse()
        rows, latents = sparse.indices()
        return sparse, self.encoder_vectors(input_acts[rows], latents)

    def encoder_vectors(self, x: Float[Tensor, "A D"], latents: Int[Tensor, " A"]) -> Float[Tensor, "A D"]:
        """Return the gradient of latent ``latents[a]`` at ``x[a]``: for a dense encoder its row, whatever x."""
        encoder = self.sae.encoder
        if isinstance(encoder, DenseEncoder):
            return encoder.weight[latents].detach()
        assert isinstance(encoder, KroneckerEncoder)
        head = latents // (encoder.d_base * encoder.d_extension)
        base = latents // encoder.d_extension % encoder.d_base
        parents = torch.stack([base, encoder.d_base + latents % encoder.d_extension], 1)
        weight_A2D = encoder.weight[head.unsqueeze(1), parents].detach()
        pre_A2 = torch.einsum("ad,apd->ap", x.to(self.dtype), weight_A2D) + encoder.bias[head.unsqueeze(1), parents]
        with torch.enable_grad():
            pre_A2 = pre_A2.detach().requires_grad_()
            (slope_A2,) = torch.autograd.grad(encoder.compose(pre_A2[:, 0], pre_A2[:, 1]).sum(), pre_A2)
        return torch.einsum("ap,apd->ad", slope_A2, weight_A2D)

    def decode_sparse(
        self, sparse_acts: Tensor, input_acts: Float[Tensor, "T D"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of sparse codes, and each one's row of ``W_dec`` times its value."""
        rows, latents = sparse_acts.indices()
        scaled = self.W_dec[latents] * sparse_acts.values().unsqueeze(1)
        summed = torch.zeros(sparse_acts.shape[0], self.d_model, device=scaled.device, dtype=scaled.dtype)
        return summed.index_add(0, rows, scaled) + self.b_dec + self._skipped(input_acts), scaled

    def _get_decoder_vectors(self, feat_ids: Any = None) -> Tensor:
        return self.W_dec if feat_ids is None else self.W_dec[feat_ids]

    def _skipped(self, input_acts: Tensor | None) -> Tensor | float:
        if self.W_skip is None:
            return 0.0
        if input_acts is None:
            raise ValueError("Transcoder has skip connection but no input_acts were provided")
        return self.compute_skip(input_acts)
