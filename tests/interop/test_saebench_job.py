"""What is asked of SAEBench, before SAEBench is started."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kronsae.interop.saebench_job import EVALUATIONS, REFUSED, Job, JobSAE, check_evaluation, split_setting
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError

SAE = JobSAE(name="topk", folder="saes/topk", hook="blocks.3.hook_resid_post", layer=3)
JOB = Job(
    saes=(SAE,),
    model="tiny",
    location="models/tiny",
    evals=("absorption", "meta_structure"),
    out="out",
    settings=("absorption.max_k_value=5", "absorption.prompt_template={word}:", "meta_structure.autocast=false"),
)


def test_a_job_is_written_and_read() -> None:
    assert from_dict(Job, json.loads(json.dumps(to_dict(JOB)))) == JOB


def test_settings_go_to_their_evaluation() -> None:
    assert JOB.settings_of("absorption") == {"max_k_value": 5, "prompt_template": "{word}:"}
    assert JOB.settings_of("meta_structure") == {"autocast": False}
    assert JOB.settings_of("sparse_probing_sae_probes") == {}


@pytest.mark.parametrize("name", list(REFUSED))
def test_an_evaluation_that_is_not_offered_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(UserError, match=rf"SAEBench's {name} is not offered: .+\."):
        check_evaluation(name)


def test_a_misspelt_evaluation_is_refused() -> None:
    with pytest.raises(UserError, match=r"got 'absorbtion'\. Did you mean 'absorption'"):
        replace(JOB, evals=("absorbtion",))
    assert not REFUSED.keys() & EVALUATIONS.keys()


@pytest.mark.parametrize("assignment", ["absorption", "absorption.k", "max_k_value=3", "absorption.=3", "=3"])
def test_a_setting_of_another_form_is_refused(assignment: str) -> None:
    with pytest.raises(UserError, match=r"settings must be EVAL.FIELD=VALUE, such as absorption.max_k_value=5; got"):
        split_setting(assignment)


def test_absorption_reads_the_output_of_a_block_alone() -> None:
    elsewhere: Any = (replace(SAE, hook="blocks.3.hook_mlp_out"),)
    with pytest.raises(UserError, match="hook must be the output of a transformer block for absorption"):
        replace(JOB, saes=elsewhere)
    assert replace(JOB, saes=elsewhere, evals=("meta_structure",)).saes == elsewhere


def test_absorption_needs_words_of_all_letters() -> None:
    with pytest.raises(UserError, match="words must be at least 260; got 259"):
        replace(JOB, words=259)
