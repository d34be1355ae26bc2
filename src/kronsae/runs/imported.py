"""SAEs that were trained elsewhere, as a run folder: every measurement, report and intervention works on it.

`import_saes` writes a finished run. Its config has the hooks and the shape of each SAE; how they were trained is not
known, so nothing can be trained or resumed there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kronsae.core import checkpoint
from kronsae.data.harvest import widths
from kronsae.data.model import LanguageModel, ModelConfig, check_hooks, load_model
from kronsae.data.text import TextConfig, TextStream
from kronsae.interop.formats.foreign import Foreign
from kronsae.interop.hook_names import family_of, from_transformer_lens, hub_name
from kronsae.runs.config import RunConfig
from kronsae.runs.hub_download import hub_place
from kronsae.runs.loading import is_sae_folder, read_sae, sae_folder
from kronsae.runs.parsing import with_options
from kronsae.runs.run import Run, sae_metadata
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError, shown, shown_text
from kronsae.support.files import check_new_folder, sha256, umask, writable
from kronsae.support.sealed import write_sealed
from kronsae.training.config import LoopConfig, MemberConfig

IMPORTED = Path("runs/imported")
"""Folder of the runs that `run_or_sae` makes, in the working directory."""

MAX_STATEMENT = 10_000
"""Characters of one of the statements of an SAE's files that are kept."""

MAX_CONTEXT = 2**17
"""Tokens of a stated context that are believed."""

PROCESSING = ("center_writing_weights", "fold_ln", "fold_value_biases", "refactor_factored_attn_matrices")
"""Options of TransformerLens' ``from_pretrained`` that change activations; ``center_unembed`` changes no hook."""

SAE_SUFFIXES = (".json", ".safetensors", ".npz", ".pt")


@dataclass(frozen=True)
class Import:
    """An SAE to import: its name in the run, where it comes from, what was read, and the warnings of reading it."""

    name: str
    source: str
    foreign: Foreign
    warned: tuple[str, ...] = ()

    @property
    def tokens(self) -> int | None:
        """Return the tokens that it was trained on; None: its files do not say."""
        settings = self.foreign.settings
        tokens = settings.get("tokens", settings.get("training_tokens"))  # ours, SAELens'
        return tokens if isinstance(tokens, int) and tokens > 0 else None

    @property
    def about(self) -> dict[str, Any]:
        """Return where it comes from, as JSON."""
        of = self.foreign
        about: dict[str, Any] = {
            "source": self.source,
            "format": of.format,
            "architecture": of.architecture,
            "model": of.model,
        }
        settings = {key: value for key, value in of.settings.items() if _is_json(value)}
        about |= {"hook_read": of.hook_read, "hook_write": of.hook_write, "settings": settings}
        return about | {"remarks": self.remarks}

    @property
    def context(self) -> int | None:
        """Return the tokens of a window that it was trained on; None: its files do not say."""
        context = self.foreign.settings.get("context_size")
        return context if type(context) is int and 0 < context <= MAX_CONTEXT else None

    @property
    def remarks(self) -> list[str]:
        """Return what a user must know to judge its figures: one sentence or more for each matter."""
        remarks, stated = list(self.warned), self.foreign.settings
        loaded = stated.get("model_from_pretrained_kwargs")
        processed = [key for key in PROCESSING if loaded.get(key) is True] if isinstance(loaded, dict) else []
        if processed:
            remarks.append(
                f"{shown_text(self.source)} was trained on activations of a model that TransformerLens had processed "
                f"({', '.join(processed)}); those of the Hugging Face model, on which it is measured here, can differ "
                "by this processing."
            )
        positions = stated.get("seqpos_slice")
        if isinstance(positions, list | tuple) and any(one is not None for one in positions):
            remarks.append(
                f"{shown_text(self.source)} was trained on some positions of a window only (seqpos_slice = "
                f"{shown(positions)}); it is measured here on all of them."
            )
        return remarks

    def hook(self, name: str | None, model: str | None, model_type: str | None) -> str | None:
        """Return a hook that the files state as our hook; None stays None."""
        family = family_of(model_type, model or self.foreign.model)
        return None if name is None else from_transformer_lens(name, family)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where SAEs belong.

    Args:
        model: language model; None: the one that the files state.
        text: source of the text to measure on.
        hook: hook read, or several for a crosscoder (``"layers.2,layers.3"``); None: that which the files state.
        write: hook written by a transcoder; None: that which the files state.
    """

    model: str | None = None
    text: str | None = None
    hook: str | None = None
    write: str | None = None

    @property
    def given(self) -> list[str]:
        """Return the options that were given."""
        values = {"--model": self.model, "--text": self.text, "--hook": self.hook, "--write": self.write}
        return [name for name, value in values.items() if value is not None]


def import_saes(
    sources: Sequence[Path | str],
    out: Path | str,
    place: Place,
    *,
    names: Sequence[str] = (),
    options: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Run:
    """Write a run folder with SAEs that were trained elsewhere; it appears whole or not at all.

    Args:
        sources: each as `kronsae.load` takes it: a folder in any known format, or on the Hub.
        out: a new or empty folder.
        place: model, text and hooks.
        names: name of each SAE in the run; none: from the names of their folders.
        options: further fields of the run's config, as for ``--set``. Without ``context_length``, windows have 256
            tokens, or as many as the files state, and no more than the model can take.
        say: told what a user must know to judge the figures.

    Raises:
        UserError: an SAE cannot be read, something is not stated, the widths are not those of the model's hooks, or
            ``out`` is in use or cannot be written. Nothing was written.
    """
    if names and len(names) != len(sources):
        raise UserError(f"--name must be given once per SAE; got {len(names)} names for {len(sources)} SAEs.")
    run = Run(Path(out))
    check_new_folder(run.folder)
    read = [_read(sae_folder(source)) for source in sources]
    chosen = list(names) if names else names_of(list(map(str, sources)))
    saes = [Import(name, str(source), *one) for name, source, one in zip(chosen, sources, read, strict=True)]
    language_model = _loaded(_config(saes, place, options), place)
    config = _config(saes, place, options, getattr(language_model.model.config, "model_type", None))
    given = any(option.startswith("context_length=") for option in options)
    config = _fitted(config, saes, language_model, context_is_given=given)
    next(iter(TextStream(config.text, held_out=True, held_out_share=config.held_out_share, repeat=False)))
    with writable(run.folder):
        _write(run.folder, config, saes)
    for one in saes:
        for remark in one.remarks:
            say(remark)
    return run


def run_or_sae(argument: Path, place: Place, *, say: Callable[[str], None]) -> Path:
    """Return the run folder to measure: the argument itself, or the run that an SAE is imported into.

    An SAE (its folder; with a text, also a folder that holds it; with anything of ``place``, a name on the Hub) is
    imported once, into a folder of `IMPORTED` that is named after it, and a digest of its files, ``place`` and the
    version of kronsae; later calls use it again.

    Raises:
        UserError: options are given for a run, or an SAE cannot be imported.
    """
    is_run = (argument / "run.json").exists()
    if is_run and place.given:
        raise UserError(
            f"{', '.join(place.given)} must be left out for a run, whose run.json has them; got {argument}. They are "
            "for the folder of a single SAE."
        )
    is_sae = not is_run and argument.is_dir() and (is_sae_folder(argument) or place.text is not None)
    is_hub = not argument.exists() and bool(place.given) and hub_place(argument.as_posix()) is not None
    if not (is_sae or is_hub):
        return argument
    if place.text is None:
        raise UserError(f"--text must be given to measure {argument}, an SAE{_text_hint(argument)}")
    folder = sae_folder(argument.as_posix())
    (name,) = names_of([argument.as_posix()])
    out = IMPORTED / f"{name}-{_digest(folder, place)}"
    if Run(out).finished:
        say(f"Using {out}, into which this SAE was imported before.")
        for about in Run(out).imported.values():
            for remark in about.get("remarks", ()):
                say(remark)
        return out
    import_saes([argument], out, place, names=[name], say=say)
    say(f"Imported {argument} into the run folder {out}.")
    return out


def _text_hint(folder: Path) -> str:
    """Return what the files of an SAE say about text: only those of kronsae name the one that it was trained on."""
    source = None
    if folder.is_dir() and checkpoint.is_own(folder):
        about = checkpoint.read_config(folder).get("metadata")
        text = about.get("text") if isinstance(about, dict) else None
        source = text.get("source") if isinstance(text, dict) else None
    if not isinstance(source, str):
        return ": no file says what to measure it on."
    run = folder.parent.parent if len(folder.parts) > 2 else folder.resolve().parent.parent
    whole = f", or measure its run: kronsae eval {shlex.quote(str(run))}" if (run / "run.json").exists() else ""
    return f"; it was trained on {shown(source)}. Give --text {shown_text(shlex.quote(source))}{whole}."


def _read(folder: Path) -> tuple[Foreign, tuple[str, ...]]:
    """Return the SAE in a folder, and the warnings of reading it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        foreign = read_sae(folder)
    return foreign, tuple(str(one.message) for one in caught if one.category is UserWarning)


def _is_json(value: object) -> bool:
    """Whether a statement of a stranger's file can be kept in ours: Python reads NaN in JSON, which is none."""
    try:
        return len(json.dumps(value, allow_nan=False)) <= MAX_STATEMENT
    except (ValueError, TypeError, RecursionError):
        return False


def names_of(sources: Sequence[str]) -> list[str]:
    """Return a different name for each source, from the last part of its path."""
    found: list[str] = []
    for source in sources:
        path = Path(source)
        last = re.split(r"[/:]", str(path.resolve() if path.is_dir() else source).rstrip("/"))[-1]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:64] or "sae"
        again = sum(one == name or one.startswith(f"{name}-") for one in found)
        found.append(name if name not in found else f"{name}-{again + 1}")
    return found


def _config(saes: Sequence[Import], place: Place, options: Sequence[str], model_type: str | None = None) -> RunConfig:
    """Return the run's config; without the type of the language model, hooks are named after its name."""
    members = tuple(_member(one, place, model_type) for one in saes)
    if place.text is None:
        raise UserError("--text must be given: what to measure the SAEs on.")
    config = RunConfig(
        model=ModelConfig(name=place.model or _stated_model(saes)),
        text=TextConfig(source=place.text),
        hook=members[0].reads("")[0],
        saes=members,
        loop=LoopConfig(tokens=1, batch_tokens=1),  # a config must have a budget; nothing is trained
    )
    return from_dict(RunConfig, to_dict(with_options(config, options)))


def _loaded(config: RunConfig, place: Place) -> LanguageModel:
    """Load the language model."""
    try:
        return load_model(config.model)
    except UserError as error:
        if place.model is not None:
            raise
        raise UserError(
            f"--model must be given: the files name the language model {shown(config.model.name)}, which cannot be "
            f"loaded. {error}"
        ) from None


def _member(one: Import, place: Place, model_type: str | None) -> MemberConfig:
    """Return the config of an SAE as a member of a run; its training settings are the defaults, of no meaning."""
    shape, foreign = one.foreign.sae.config, one.foreign
    read = place.hook or one.hook(foreign.hook_read, place.model, model_type)
    if read is None:
        raise UserError(f"--hook must be given: the files of {one.source} do not state which hook it reads.")
    stated = one.hook(foreign.hook_write, place.model, model_type)
    written = place.write or (stated if place.hook is None else None)
    if shape.autoencodes and written is not None:
        raise UserError(f"--write must be left out for {one.source}, which reconstructs the hook that it reads.")
    if not shape.autoencodes and written is None:
        raise UserError(
            f"--write must be given: {one.source} is a transcoder, which writes another hook than it reads."
        )
    return MemberConfig(
        name=one.name,
        encoder=shape.encoder,
        sparsifier=shape.sparsifier,
        normalize_activations="none",
        read=tuple(read.split(",")),
        write=None if written is None else tuple(written.split(",")),
        skip=shape.skip,
        pursuit=shape.pursuit,
    )


def _stated_model(saes: Sequence[Import]) -> str:
    """Return the language model that the files of all SAEs state."""
    stated = {one.source: one.foreign.model for one in saes}
    for source, model in stated.items():
        if model is None:
            raise UserError(f"--model must be given: the files of {source} do not state a language model.")
    if len(models := sorted({hub_name(str(model)) for model in stated.values()})) > 1:
        raise UserError(f"--model must be given: the files state different language models, {', '.join(models)}.")
    return models[0]


def _fitted(
    config: RunConfig, saes: Sequence[Import], language_model: LanguageModel, *, context_is_given: bool
) -> RunConfig:
    """Return the config with windows no longer than the model takes; refuse SAEs of other widths than its hooks.

    Args:
        config: the run's config.
        saes: the SAEs, in the order of the config's.
        language_model: its language model.
        context_is_given: whether a context that is too long is refused. Otherwise it is the shortest that the files
            state, or the config's, and no longer than the model takes.
    """
    check_hooks(language_model.model, config.hooks)
    if not context_is_given:
        context = min([one.context for one in saes if one.context is not None], default=config.context_length)
        config = replace(config, context_length=min(context, language_model.max_positions or context))
    language_model.check_context_length(config.context_length)
    found = widths(language_model, config.hooks)
    for one, member in zip(saes, config.saes, strict=True):
        shape = one.foreign.sae.config
        for verb, hooks, sizes in (
            ("reads", member.reads(config.hook), shape.widths_read),
            ("writes", member.writes(config.hook), shape.widths_written),
        ):
            model_widths = tuple(found[hook] for hook in hooks)
            if sizes != model_widths:
                raise UserError(
                    f"{one.source} {verb} {'+'.join(map(str, sizes))} numbers per token; {' + '.join(hooks)} of model "
                    f"'{config.model.name}' has {'+'.join(map(str, model_widths))}. Give the model and the hook that "
                    "it was trained on."
                )
    return config


def _write(folder: Path, config: RunConfig, saes: Sequence[Import]) -> None:
    """Write the run beside its place and put it there when all of it is on disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        for one, member in zip(saes, config.saes, strict=True):
            about = sae_metadata(config, member, 0) | {"tokens": one.tokens, "imported": one.about}
            checkpoint.save(one.foreign.sae, temporary / "saes" / one.name, about)
        imported = {one.name: one.about for one in saes}
        run = {"kronsae_version": version("kronsae"), "config": to_dict(config), "imported": imported}
        write_sealed(temporary / "run.json", run)
        nothing = {"steps": 0, "tokens": None, "seconds": None}
        figures = {
            "sae_tokens": {one.name: one.tokens for one in saes},
            "sae_seconds": {one.name: None for one in saes},
        }
        write_sealed(temporary / "training.json", nothing | figures)
        temporary.chmod(0o777 & ~umask())
        if folder.is_dir():
            folder.rmdir()  # empty; Windows renames to no existing folder
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(folder: Path, place: Place) -> str:
    """Return 12 digits of the SHA-256 of an SAE's files, ``place``, and the version, whose conversion may differ."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in SAE_SUFFIXES)
    content: list[Any] = [[path.name, sha256(path)] for path in files]
    return hashlib.sha256(json.dumps([content, to_dict(place), version("kronsae")]).encode()).hexdigest()[:12]
