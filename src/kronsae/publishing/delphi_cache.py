"""Export of a run's latents as a cache of delphi."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kronsae.core.checks import check_count
from kronsae.data.model import local_folder
from kronsae.eval.hooked import Windows, hidden_states, kept
from kronsae.interop.delphi import CacheWriter
from kronsae.interop.exportable import Exported
from kronsae.runs.folder import RunFolder
from kronsae.runs.loaded import LoadedRun
from kronsae.support.errors import UserError
from kronsae.support.files import check_new_folder, whole_or_nothing
from kronsae.support.progress import Progress, progress_of_part

EXAMPLE = 32
"""Length of delphi's examples by default; it must divide the length of the windows."""


def export_delphi(
    run: RunFolder,
    out: Path,
    names: Sequence[str] = (),
    *,
    tokens: int,
    splits: int,
    progress: Progress | None = None,
) -> Exported:
    """Write a cache of delphi for SAEs of a run, on held-out text: ``out/SAE/latents/HOOK``.

    delphi takes every token of a cache for text, so windows shorter than the run's context length are left out.
    Special tokens stay in the windows, without activations, because SAEs are not trained on them.

    Args:
        run: the finished run, whose SAEs read one hook.
        out: a new or empty folder.
        names: SAEs to export; none: all of the run.
        tokens: tokens to read, at most; those of the windows that are left out count.
        splits: number of files per SAE.
        progress: called with the number of tokens done and in all.

    Raises:
        UserError: the run is not finished, ``out`` is in use, an SAE reads several hooks, or no window is long enough.
            Nothing has been written.
    """
    check_count("tokens", tokens)
    check_count("splits", splits)
    loaded = LoadedRun(run)
    chosen = list(dict.fromkeys(names or run.names))
    for name in chosen:
        run.sae_folder(name)
        if len(loaded.places[name].read) > 1:
            raise UserError(f"SAEs must read one hook for a cache of delphi; '{name}' reads several. Leave it out.")
    check_new_folder(out)
    length = run.config.context_length
    read = loaded.windows(tokens)
    windows = [full for one in read if len(full := _of_length(one, length))]
    if not windows:
        raise UserError(
            f"the held-out text must hold windows of the full context_length of {length} tokens; its documents are "
            "shorter. Train on longer documents, or with a smaller context_length."
        )
    rows, short = sum(map(len, windows)), sum(map(len, read)) - sum(map(len, windows))
    remarks = [f"{rows:,} windows of {length} tokens; {short:,} shorter ones are left out."]
    if length % EXAMPLE:
        remarks.append(f"delphi's example_ctx_len must divide the windows' {length} tokens; its default is {EXAMPLE}.")
    folders = {}
    with whole_or_nothing(out):
        for number, name in enumerate(chosen):
            part = progress_of_part(progress, number, len(chosen))
            folders[name], entries = _write(loaded, name, out / name / "latents", windows, splits, part)
            remarks.append(f"{name}: {entries:,} activations.")
    call = f"LatentDataset({str(folders[chosen[0]])!r}, SamplerConfig(), ConstructorConfig())"
    return Exported(folders=folders, remarks=tuple(remarks), next_steps=(f"in delphi, {call}",))


def _of_length(windows: Windows, length: int) -> Windows:
    """Return the windows that hold ``length`` tokens."""
    ids_ST, mask_ST, keep_ST = windows.input_ids_ST, windows.attention_mask_ST, windows.keep_ST
    rows = (mask_ST.sum(1) == length).nonzero()[:, 0]
    return Windows(ids_ST[rows], mask_ST[rows], keep_ST[rows], windows.first)


def _write(
    loaded: LoadedRun, name: str, latents: Path, windows: Sequence[Windows], splits: int, progress: Progress | None
) -> tuple[Path, int]:
    """Write the cache of one SAE; return the folder that delphi reads, and the number of activations."""
    config, sae, (hook,) = loaded.run.config, loaded.saes[name], loaded.places[name].read
    folder = local_folder(config.model.name)
    about = {
        "dataset_repo": config.text.source,
        "dataset_split": "held-out",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": config.model_batch,
        "model_name": config.model.name if folder is None else str(folder),
    }
    done, total = 0, sum(one.num_kept for one in windows)
    with CacheWriter(latents, hook.name, d_sae=sae.d_sae, splits=splits, config=about) as writer:
        for one in windows:
            with torch.no_grad():
                codes = sae.encode(kept(hidden_states(loaded.language_model, hook, one), one))
            writer.add(one.input_ids_ST, one.keep_ST, codes)
            done += one.num_kept
            if progress is not None:
                progress(done, total)
    return latents, writer.entries
