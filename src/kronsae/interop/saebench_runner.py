"""Run SAEBench on SAEs of ours: ``python -m kronsae.interop.saebench_runner FOLDER``, where sae-bench is installed.

The folder holds ``job.json`` (`Job`). What SAEBench writes beside its results goes into it as well; the results go to
the job's own folder, each when it is complete. ``outcome.json`` says what became of every SAE and evaluation.

SAEBench keeps activations, probes and tables under names of model and SAE, in its own installation, and takes them up
again in later runs. Here each job has its own folder, and every evaluation of every SAE starts from the same seed.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kronsae.core.checkpoint import load
from kronsae.core.sae import SAE
from kronsae.interop.saebench import SAEBenchConfig, SAEBenchSAE
from kronsae.interop.saebench_job import JOB_FILE, OUTCOME_FILE, WORDS_PER_LETTER, Job, JobSAE
from kronsae.support.config import from_dict
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import read_json, write_json
from kronsae.support.terminal import say

MAX_DIFFERENCE = 1e-3
"""Largest difference of TransformerLens' activations from those of transformers, relative to their norm."""

LINK = "language_model"

SENTENCE = "The quick brown fox jumps over the lazy dog."


class Evaluator:
    """Language model and folders of one job.

    Args:
        job: what to evaluate.
        folder: for what SAEBench writes beside its results.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The language model in TransformerLens, loaded once."""
        if self._model is None:
            self._model = load_model(self.job, self.folder)
        return self._model

    def evaluate(self, name: str, about: JobSAE, sae: SAE) -> Path:
        """Evaluate one SAE; return SAEBench's result file, moved to its place.

        Raises:
            UserError: the evaluation has no result, and why.
        """
        _seed(self.job.seed)
        written = self.folder / "results" / name
        written.mkdir(parents=True, exist_ok=True)
        cfg = SAEBenchConfig(
            model_name=self.job.model,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            hook_layer=about.layer,
            hook_name=about.hook,
            architecture=sae.config.architecture,
            context_size=self.job.context_length,
            dataset_path=self.job.text,
            training_tokens=about.training_tokens,
        )
        # in its tables beside the result, absorption writes the cosines of W_enc, which enter no score
        adapter = SAEBenchSAE(sae, cfg, placeholder=name == "absorption").to(self.job.device)
        with nullcontext() if name == "meta_structure" else self._own_model():
            getattr(self, f"_{name}")(about, adapter, str(written))
        result = written / f"{about.name}_custom_sae_eval_results.json"
        if not result.is_file():
            raise UserError(
                f"{name}: too few letters have a probe with a sufficient F1 on {self.job.model} (20 letters above 0.6 "
                "unless set otherwise): the model spells too badly for it."
            )
        target = Path(self.job.out) / "eval_results" / name / result.name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        part.write_bytes(result.read_bytes())
        part.replace(target)
        return target

    def _absorption(self, about: JobSAE, adapter: SAEBenchSAE, output: str) -> None:
        from sae_bench.evals.absorption import common, feature_absorption, main

        kept = self.folder / "absorption"
        probing = {"probes_dir": kept / "probes"}
        config = _configured(
            main.AbsorptionEvalConfig,
            {"model_name": self.job.model, "random_seed": self.job.seed},
            self.job.settings_of("absorption"),
        )
        with ExitStack() as stack:
            k_sparse = partial(main.run_k_sparse_probing_experiment, experiment_dir=kept / "k_sparse", **probing)
            experiment = partial(
                main.run_feature_absortion_experiment,
                experiment_dir=kept / "absorption",
                sparse_probing_experiment_dir=kept / "k_sparse",
                **probing,
            )
            stack.enter_context(_replaced(main, "run_k_sparse_probing_experiment", k_sparse))
            stack.enter_context(_replaced(main, "run_feature_absortion_experiment", experiment))
            if self.job.words is not None:
                some = partial(_some_words, common.get_alpha_tokens, self.job.words, self.job.seed)
                for module in (common, feature_absorption):
                    stack.enter_context(_replaced(module, "get_alpha_tokens", some))
            common.load_or_train_probe(  # once for all SAEs, so that the rest starts from the seed for each
                self.model,
                base_template=config.prompt_template,
                pos_idx=config.prompt_token_pos,
                layer=about.layer,
                probes_dir=probing["probes_dir"],
                device=self.job.device,
            )
            _seed(self.job.seed)
            try:
                main.run_eval(config, [(about.name, adapter)], self.job.device, output, True)
            except KeyError as error:  # SAEBench looks up a probe for each letter, by number
                if error.args[0] not in range(26):
                    raise
                raise UserError(
                    f"absorption: every letter must begin a word that SAEBench trains on; none begins with "
                    f"'{chr(ord('a') + error.args[0])}'. Use more words, or a model with a larger vocabulary."
                ) from error

    def _sparse_probing_sae_probes(self, about: JobSAE, adapter: SAEBenchSAE, output: str) -> None:
        from sae_bench.evals.sparse_probing_sae_probes import main
        from sae_probes.generate_model_activations import ensure_dataset_activations

        own = {
            "model_name": self.job.model,
            "random_seed": self.job.seed,
            "results_path": str(self.folder / "probes"),
            "model_cache_path": str(self.folder / "activations"),
        }
        given = self.job.settings_of("sparse_probing_sae_probes")
        config = _configured(main.SparseProbingSaeProbesEvalConfig, own, given)
        ensure_dataset_activations(  # its own call would read texts longer than the model's context
            model_name=config.model_name,
            dataset_short_names=config.dataset_names,
            hook_names=[about.hook],
            model_cache_path=config.model_cache_path,
            device=self.job.device,
            max_seq_len=min(1024, self.model.cfg.n_ctx),
            model=self.model,
        )
        main.run_eval(config, [(about.name, adapter)], self.job.device, output, True)

    def _meta_structure(self, about: JobSAE, adapter: SAEBenchSAE, output: str) -> None:
        from sae_bench.evals.meta_structure import main

        given = self.job.settings_of("meta_structure")
        config = _configured(main.MetaStructureEvalConfig, {"random_seed": self.job.seed}, given)
        main.run_eval(config, [(about.name, adapter)], self.job.device, output, True)

    @contextmanager
    def _own_model(self) -> Iterator[None]:
        """Let SAEBench, which loads the model by its name in every evaluation, get the one that is loaded."""
        from transformer_lens import HookedTransformer

        model = self.model

        def loaded(*_args: object, **_options: object) -> Any:
            return model

        with _replaced(HookedTransformer, "from_pretrained_no_processing", staticmethod(loaded)):
            yield


def load_model(job: Job, folder: Path) -> Any:
    """Load the language model into TransformerLens, its weights as they are.

    TransformerLens takes the names of models that it lists; what it does with a folder, it decides by the config in it,
    but for words such as "llama" in the path. So a local model is linked under a plain name in ``folder``.

    Raises:
        UserError: TransformerLens does not know its architecture, or gives other activations than transformers.
    """
    from transformer_lens import HookedTransformer, loading_from_pretrained

    name = job.location
    if name.startswith(tuple(loading_from_pretrained.NEED_REMOTE_CODE_MODELS)):
        raise UserError(
            f"model: '{job.model}' needs code of its own, and such code is never run. Choose another model."
        )
    official = loading_from_pretrained.get_official_model_name
    if Path(name).is_dir():
        link = folder / LINK
        link.unlink(missing_ok=True)
        link.symlink_to(Path(name).absolute(), target_is_directory=True)
        name = LINK
    try:
        with (
            chdir(folder),
            _replaced(
                loading_from_pretrained, "get_official_model_name", lambda one: one if one == LINK else official(one)
            ),
        ):
            model = HookedTransformer.from_pretrained_no_processing(name, device=job.device, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError, OSError, AttributeError, ImportError) as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"model: TransformerLens, with which SAEBench runs models, cannot load '{job.model}' ({words[:120]}). "
            "Choose a model of an architecture that it knows."
        ) from error
    model.eval()
    for layer in sorted({sae.layer for sae in job.saes}):
        _check_activations(job, model, layer)
    model.cfg.model_name = job.model
    return model


@torch.inference_mode()
def _check_activations(job: Job, model: Any, layer: int) -> None:
    """Compare a block's output with that of transformers, on which SAEs are trained."""
    from transformers import AutoModelForCausalLM

    if not 0 <= layer < model.cfg.n_layers:
        raise UserError(f"hook must name a layer from 0 to {model.cfg.n_layers - 1} of '{job.model}'; got {layer}.")
    tokens = model.to_tokens(SENTENCE)
    hook = f"blocks.{layer}.hook_resid_post"
    _, cache = model.run_with_cache(tokens, names_filter=hook, stop_at_layer=layer + 1)
    original = AutoModelForCausalLM.from_pretrained(job.location, dtype=torch.float32, use_safetensors=True)
    blocks = max((module for module in original.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    seen: list[torch.Tensor] = []
    blocks[layer].register_forward_hook(
        lambda _module, _inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    original(tokens.cpu())
    expected, found = seen[0].float(), cache[hook].float().cpu()
    difference = float((found - expected).norm() / expected.norm())
    say(f"{hook}: TransformerLens differs from transformers by {difference:.1e} of the norm")
    if not difference < MAX_DIFFERENCE:
        raise UserError(
            f"model: TransformerLens must run '{job.model}' as transformers does; at {hook} they differ by "
            f"{difference:.1e} of the norm. SAEs trained on one cannot be measured on the other."
        )


def _configured(kind: Any, own: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Return SAEBench's config with our values and the user's.

    Raises:
        UserError: there is no such field, or SAEBench refuses the value.
    """
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            raise UserError(f"settings: {kind.__name__} has no field '{name}'.{nearest(name, known)}")
        if name in own:
            raise UserError(f"settings: {name} of {kind.__name__} is set by the command itself; leave it out.")
    try:
        return kind(**own, **given)
    except ValueError as error:
        raise UserError(f"settings: {kind.__name__} refuses a value: {' '.join(str(error).split())}") from error


def _some_words(all_words: Any, number: int, seed: int, tokenizer: Any, **options: Any) -> list[str]:
    """Return ``number`` words drawn at random, `WORDS_PER_LETTER` of each letter among them where there are as many."""
    words: list[str] = all_words(tokenizer, **options)
    random.Random(seed).shuffle(words)
    seen: Counter[str] = Counter()
    ranks = []
    for word in words:
        letter = word.strip()[0].lower()
        ranks.append(seen[letter])
        seen[letter] += 1
    first = sorted(range(len(words)), key=lambda place: ranks[place] >= WORDS_PER_LETTER)  # stable
    return [words[place] for place in first[:number]]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the generator that SAEBench uses
    torch.manual_seed(seed)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def metrics_of(result: Path) -> dict[str, float]:
    """Return the scores of a result file of SAEBench, without those that are undefined."""
    groups = json.loads(result.read_text(encoding="utf-8"))["eval_result_metrics"]
    return {name: value for group in groups.values() for name, value in group.items() if value is not None}


def run(folder: Path) -> list[dict[str, Any]]:
    """Run the job in a folder; return one row per SAE and evaluation: file and metrics, or the reason of none."""
    job = from_dict(Job, read_json(folder / JOB_FILE, "the job"), where="job")
    os.chdir(folder)  # SAEBench writes into "artifacts" of the working directory
    evaluator, rows = Evaluator(job, folder), []
    for name in job.evals:
        for about in job.saes:
            sae = load(about.folder).eval()
            row: dict[str, Any] = {"sae": about.name, "eval": name, "file": None, "metrics": {}, "reason": None}
            try:
                result = evaluator.evaluate(name, about, sae)
                row |= {"file": str(result), "metrics": metrics_of(result)}
            except UserError as error:
                row["reason"] = str(error)
            except Exception as error:  # of SAEBench; the other evaluations go on
                traceback.print_exc()
                row["reason"] = f"SAEBench failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})."
            rows.append(row)
            write_json(folder / OUTCOME_FILE, rows)
    return rows


if __name__ == "__main__":
    run(Path(sys.argv[1]).absolute())
