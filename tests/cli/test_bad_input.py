"""Invalid command lines: exit status 2, a short error, nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import KRON, Kronsae, without
from tests.tiny_models import make_model, make_tokenizer
from tests.tiny_runs import listing

from kronsae.core.gates import GATES
from kronsae.runs.recipes import SAE_KINDS
from kronsae.runs.run import Run
from kronsae.support.config import to_dict

BAD_SAES = {
    "": f"--sae must begin with one of {', '.join(SAE_KINDS)}; got ''.",
    "topp d_sae=8 k=2": f"--sae must begin with one of {', '.join(SAE_KINDS)}; got 'topp d_sae=8 k=2'. "
    "Did you mean 'topk'?",
    "topk": "--sae topk must have d_sae, k; got 'topk'.",
    "topk d_sae=8": "--sae topk must have k; got 'topk d_sae=8'.",
    "topk d_sae=8 k": "--sae must have name=value pairs after its kind; got 'k' in 'topk d_sae=8 k'.",
    "topk d_sae=8 k=two": "k must be int; got 'two'.",
    "topk d_sae=8 k=": "k must be int; got ''.",
    "topk d_sae=8 k=[2]": "k must be int; got [2].",
    "topk d_sae=8 k=2.5": "k must be int; got 2.5.",
    "topk d_sae=0 k=2": "d_sae must be a whole number above 0; got 0.",
    "topk d_sae=99999999999999999999 k=2": "d_sae must be at most 1,000,000,000,000; got 99999999999999999999. "
    "Ask for less.",
    "kron num_heads=999999999999 d_base=999999999999 d_extension=2 k=2": (
        "num_heads * d_base * d_extension must be at most 1,000,000,000,000; got 1999999999996000000000002. "
        "Ask for less."
    ),
    "topk d_sae=8 k=9": "k must be at most d_sae; got k=9 with d_sae=8. Lower k or widen.",
    "topk d_sea=8 k=2": "'d_sea' is not an argument of topk; got 'topk d_sea=8 k=2'. Did you mean 'd_sae'?",
    "topk d_sae=8 k='2": "--sae must have matching quotes; got 'topk d_sae=8 k='2' (No closing quotation).",
    "topk d_sae=8 k=2 name=a/b": "name must be letters, digits, '.', '_' or '-', because it names a folder; got 'a/b'.",
    "topk d_sae=8 k=2 lr=Infinity": "optimizer.lr must be finite; got inf.",
    "topk d_sae=8 k=2 lr=-1": "optimizer.lr must be above 0; got -1.0.",
    "topk d_sae=8 k=2 seed=1.5": "seed must be int; got 1.5.",
    "topk d_sae=8 k=2 unit_norm_decoder=3": "unit_norm_decoder must be bool; got 3.",
    "kron num_heads=8 d_base=2 d_extension=2 k=4 d_sae=33": (
        "d_sae must equal num_heads * d_base * d_extension; got 33 with 8 * 2 * 2 = 32. Leave d_sae out, or change one."
    ),
    "kron num_heads=8 d_base=2 d_extension=2 k=4 gate=mend": f"gate must be one of {', '.join(map(repr, GATES))}; "
    "got 'mend'.",
}


class TestBadInput:
    @pytest.mark.parametrize("spec", BAD_SAES)
    def test_an_sae(self, spec: str, base: list[str], kronsae: Kronsae, tmp_path: Path) -> None:
        outcome = kronsae(*base, "--sae", spec, "--out", tmp_path / "r")
        assert (outcome.status, outcome.sentence) == (2, BAD_SAES[spec])
        assert listing(tmp_path) == []

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (
                ["--set", "lop.tokens=5"],
                r"^--set must name a field of the config; got 'lop.tokens', in which 'lop' is unknown. "
                r"Did you mean 'loop'\? Known: ",
            ),
            (
                ["--set", "loop.batch_tokns=5"],
                r"^--set must name a field of the config; got 'loop.batch_tokns', in which 'batch_tokns' is unknown. "
                r"Did you mean 'batch_tokens'\?",
            ),
            (["--set", "saes.1.name=x"], r"; got 'saes.1.name', in which '1' is unknown. Known: 0.$"),
            (["--set", "hook.x=1"], r"; got 'hook.x', in which 'x' is unknown. This value has no fields.$"),
            (
                ["--set", "loop.tokens"],
                r"^--set must be field=value, such as loop.batch_tokens=4096; got 'loop.tokens'.$",
            ),
            (["--set", "loop.tokens=many"], r"^config.loop.tokens must be int; got 'many'.$"),
            (["--set", "loop.log_every=0"], r"^log_every must be a whole number above 0; got 0.$"),
            (["--set", "model.dtype=float8"], r"^dtype must be one of float32, bfloat16, float16; got 'float8'."),
            (
                ["--set", "buffer_tokens=10"],
                r"^buffer_tokens must be at least batch_tokens; got 10 with batch_tokens=64.",
            ),
            (["--set", "context_length=65"], r"^context_length must not exceed the 64 positions of model "),
            (
                ["--set", "saes.0.optimizer.final_lr=NaN"],
                r"^optimizer.final_lr must be finite and at least 0; got nan.$",
            ),
            (
                ["--tokens", "63"],
                r"^tokens must be at least one batch; got tokens=63 with batch_tokens=64. Ask for more",
            ),
            (["--flops", "1e9"], r"^the budget must be either tokens or flops; got tokens=256, flops=1"),
            (
                ["--same-flops-as", "korn"],
                r"^same_flops_as must name an SAE of the run: kron; got 'korn'.$",
            ),
            (["--tokens", "-3"], r"^tokens must be a whole number above 0; got -3.$"),
            (
                ["--hook", "layers.2.mpl"],
                r"^hook must name a module .*; got 'layers.2.mpl'. Did you mean 'layers.2.mlp'\?$",
            ),
            (["--hook", "9"], r"^hook must name a layer from 0 to 3; got '9'. The model has 4 layers.$"),
            (["--model", "/no/such/folder"], r"^model: there is no folder '/no/such/folder'. Check the path, or give"),
            (
                ["--model", "no-such-model"],
                r"^model: there is no folder and no cached model 'no-such-model', and the Hugging",
            ),
            (
                ["--text", "/no/such.txt"],
                r"^text: a path must exist; '/no/such.txt' does not. Check it, or give a Hub",
            ),
            (["--wandb", "project"], r"^wandb must be installed to log to it. Install it with: pip install 'krons"),
            (["--sae", "topk d_sae=8 k=2 name=kron"], r"^saes must have different names; got kron, kron. Give name="),
            (
                ["--recipe", "tny"],
                r"^recipe must be one of quickstart, quickstart-smollm2, tiny, .*; got 'tny'. Did you mean 'tiny'\?$",
            ),
            (
                ["--recipe", "tiny", "--config", "x"],
                r"^--recipe and --config must not be given together; got both. Leave one out.$",
            ),
            (["--config", "no.json"], r"^the config: no.json does not exist.$"),
            (
                ["--activations", "x"],
                r"^--model and --text must not be given with --activations, which determines them; got "
                r"--model, --text. Leave them out.$",
            ),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_an_option(
        self, words: list[str], sentence: str, base: list[str], kronsae: Kronsae, tmp_path: Path
    ) -> None:
        if words[0] != "--set" and words[0] in base:
            base = without(base, words[0])
        outcome = kronsae(*base, "--sae", KRON, *words, "--out", tmp_path / "r")
        assert outcome.status == 2
        assert re.search(sentence, outcome.sentence), outcome.sentence
        assert listing(tmp_path) == []

    def test_missing_arguments(self, kronsae: Kronsae, tmp_path: Path) -> None:
        out = tmp_path / "r"
        outcome = kronsae("train", "--out", out)
        assert outcome.status == 2
        assert outcome.sentence == (
            "--tokens, --sae, --model, --text, --hook must be given without --recipe or --config. "
            "See `kronsae train --help`."
        )
        outcome = kronsae("train", "--activations", tmp_path, "--out", out)
        assert (
            outcome.sentence
            == "--tokens, --sae must be given without --recipe or --config. See `kronsae train --help`."
        )
        outcome = kronsae("train", "--activations", tmp_path, "--tokens", 100, "--sae", KRON, "--out", out)
        assert outcome.sentence.endswith("has no manifest.json. Harvest into it first.")
        for words, option in (
            (["train", "--recipe", "tiny"], "'--out' / '-o'"),
            (["harvest", "--out", out, "--hook", "1"], "'--tokens'"),
        ):
            outcome = kronsae(*words)
            assert outcome.status == 2
            assert outcome.sentence == f"missing option {option}. See `kronsae {words[0]} --help`."
        assert listing(tmp_path) == []

    @pytest.mark.parametrize("verb", ["eval", "report"])
    def test_a_run_folder_that_is_none(self, verb: str, kronsae: Kronsae, tmp_path: Path) -> None:
        once = "the run folder must be given once, as RUN or as --out RUN; got "
        assert kronsae(verb).sentence == f"{once}none."
        assert kronsae(verb, tmp_path, "--out", tmp_path).sentence == f"{once}both."
        outcome = kronsae(verb, tmp_path / "x")
        assert (
            outcome.sentence
            == f"the run folder must exist; there is no {tmp_path / 'x'}. Give the --out of an earlier `kronsae train`."
        )
        outcome = kronsae(verb, tmp_path)
        assert outcome.status == 2
        assert outcome.sentence.startswith(
            f"{tmp_path} must hold a run; it has no run.json. If a training was interrupted"
        )
        assert listing(tmp_path) == []

    def test_an_unfinished_run_is_not_evaluated(self, finished_run: Run, kronsae: Kronsae, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_bytes((finished_run.folder / "run.json").read_bytes())
        outcome = kronsae("eval", tmp_path)
        assert outcome.status == 2
        assert outcome.sentence == (
            f"the run must be finished; {tmp_path} is not. Run the command that started it again to resume it."
        )
        assert listing(tmp_path) == ["run.json"]

    def test_a_folder_that_holds_a_different_run(self, finished_run: Run, kronsae: Kronsae) -> None:
        before = listing(finished_run.folder)
        config = finished_run.folder / "run.json"
        outcome = kronsae("train", "--config", config, "--hook", "layers.1", "--out", finished_run.folder)
        assert outcome.status == 2
        assert outcome.sentence == (
            f"out must be a new folder or hold a run with the same config; {finished_run.folder} holds a different run "
            "(hook: 'layers.2' -> 'layers.1'). Choose another --out, or remove the folder."
        )
        assert listing(finished_run.folder) == before

    def test_an_out_that_holds_other_things(self, base: list[str], kronsae: Kronsae, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("precious")
        for out, sentence in (
            (tmp_path, "out must be a new or empty folder or a run; "),
            (tmp_path / "mine", "out must be a folder; "),
            (tmp_path / "mine" / "r", "out must be a folder that can be created; "),
        ):
            outcome = kronsae(*base, "--sae", KRON, "--out", out)
            assert outcome.status == 2
            assert outcome.sentence.startswith(sentence)
        assert kronsae("harvest", "--hook", 1, "--tokens", 9, "--out", tmp_path).sentence.startswith(
            "out must be a new or empty folder"
        )
        assert listing(tmp_path) == ["mine"]
        assert (tmp_path / "mine").read_text() == "precious"

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (
                {"loop": {"tokens": 1280, "batch_tokns": 64}},
                r"run.json.loop.batch_tokns is not a known key of LoopConfig. Did you mean 'batch_tokens'\?",
            ),
            ({"sead": 1}, r"run.json.sead is not a known key of RunConfig. Did you mean 'seed'\? Known keys: model, "),
            ({"hook": 3}, r"run.json.hook must be str; got 3.$"),
            ({"saes": [{"name": "a"}]}, r"run.json.saes\[0\].encoder is missing; MemberConfig needs it.$"),
        ],
        ids=["nested key", "key", "type", "missing"],
    )
    def test_a_config_file(
        self, change: dict[str, Any], sentence: str, finished_run: Run, kronsae: Kronsae, tmp_path: Path
    ) -> None:
        path = tmp_path / "run.json"
        path.write_text(json.dumps(to_dict(finished_run.config) | change))
        outcome = kronsae("train", "--config", path, "--out", tmp_path / "r")
        assert outcome.status == 2
        assert re.search(sentence, outcome.sentence), outcome.sentence
        assert listing(tmp_path) == ["run.json"]

    def test_a_text_without_a_usable_token(self, base: list[str], kronsae: Kronsae, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text("<|endoftext|>" * 9)
        asked = [*without(base, "--text"), "--text", str(tmp_path / "t.txt"), "--set", "held_out_share=0.001"]
        outcome = kronsae(*asked, "--sae", KRON, "--out", tmp_path / "r")
        assert outcome.status == 2
        assert "text must contain tokens that are neither padding nor special tokens; found none" in outcome.err
        assert listing(tmp_path) == ["t.txt"]

    @pytest.mark.parametrize("verb", ["train", "harvest"])
    def test_activations_that_are_not_finite(
        self, verb: str, base: list[str], text_file: Path, kronsae: Kronsae, tmp_path: Path
    ) -> None:
        model: Any = make_model("gpt_neox")
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias.data[3] = float("nan")
        model.save_pretrained(tmp_path / "m")
        make_tokenizer("gpt_neox").save_pretrained(tmp_path / "m")
        before = listing(tmp_path)
        words = [*without(base, "--model"), "--sae", KRON]
        if verb == "harvest":
            words = f"harvest --text {text_file} --hook layers.2 --tokens 99 --context-length 32".split()
        outcome = kronsae(*words, "--model", tmp_path / "m", "--out", tmp_path / "r")
        assert outcome.status == 2
        assert outcome.sentence.startswith(
            "activations must be finite; hook 'layers.2' gave NaN or infinity in batch 0, "
        )
        assert listing(tmp_path) == before

    def test_a_run_that_diverges_is_reported(self, base: list[str], kronsae: Kronsae, tmp_path: Path) -> None:
        wild = "topk d_sae=32 k=4 lr=1e30 unit_norm_decoder=false"
        outcome = kronsae(*base, "--sae", wild, "--set", "loop.log_every=1", "--out", tmp_path / "r")
        assert outcome.status == 2
        assert outcome.sentence.startswith("training of 'topk' diverged: the ")

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            ("evl", r"no such command 'evl'. Did you mean 'eval'\? See `kronsae --help`."),
            ("--hlp", r"`kronsae` has no option --hlp. Did you mean '--help'\? See `kronsae --help`."),
            (
                "train --tokns 5",
                r"`kronsae train` has no option --tokns. Did you mean '--tokens'\? See `kronsae train -",
            ),
            (
                "eval latents r --latnt 5",
                r"`kronsae eval latents` has no option --latnt. Did you mean '--latent'\? See",
            ),
            (
                "steer r --scal 5",
                r"`kronsae steer` has no option --scal. Did you mean '--scale'\? See `kronsae steer --h",
            ),
            ("bench stp", r"no such command 'stp'. Did you mean 'step'\? See `kronsae bench --help`."),
            (
                "train --tokens many",
                r"invalid value for '--tokens': .*valid integer.*'many'.*\. See `kronsae train --help`",
            ),
            ("train --out", r"option '?--out'? requires an argument\. See `kronsae( train)? --help`."),
            ("recipes tiny", r"got unexpected extra argument.*tiny.*\. See `kronsae recipes --help`."),
            ("steer", r"missing argument 'RUN'\. See `kronsae steer --help`."),
        ],
        ids=lambda value: "" if "`" in value else value,
    )
    def test_words_that_are_not_known(self, words: str, sentence: str, kronsae: Kronsae) -> None:
        outcome = kronsae(*words.split())
        assert outcome.status == 2
        assert re.match(sentence, outcome.sentence), outcome.sentence

    def test_ctrl_c_outside_of_a_training(self, kronsae: Kronsae, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("kronsae.runs.recipes.describe", interrupted)
        assert kronsae("recipes").status == 130
