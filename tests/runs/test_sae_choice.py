"""Which of several SAEs is meant, by name, by folder and by the folder above."""

from __future__ import annotations

import pytest

from kronsae.runs.sae_choice import choose
from kronsae.support.errors import UserError

RUN = ["saes/kron", "saes/topk", "saelens/kron"]
SCOPE = [
    f"layer_{layer}/width_{width}k/average_l0_{l0}" for layer in (2, 10) for width, l0 in ((16, 9), (16, 77), (65, 8))
]


@pytest.mark.parametrize(
    ("folders", "name", "chosen"),
    [
        ([".", "a"], None, "."),
        ([".", "a"], "a", "a"),
        (["a/b"], None, "a/b"),
        (["saes/kron", "saelens/kron"], None, "saes/kron"),
        (RUN, "kron", "saes/kron"),
        (RUN, "saes/kron", "saes/kron"),
        (RUN, "saelens/kron", "saelens/kron"),
        (RUN, "/saelens/", "saelens/kron"),
        (SCOPE, SCOPE[4], SCOPE[4]),
        (SCOPE, "layer_10/width_65k", SCOPE[5]),
    ],
)
def test_the_sae_that_is_meant(folders: list[str], name: str | None, chosen: str) -> None:
    assert choose(folders, name, where="user/repo at commit 1", source="user/repo") == chosen


def refusal(folders: list[str], name: str | None) -> str:
    with pytest.raises(UserError) as caught:
        choose(folders, name, where="user/repo at commit 1", source="user/repo")
    return str(caught.value)


def test_several_are_named_in_the_order_of_their_numbers() -> None:
    assert refusal(SCOPE[::-1], "layer_10/width_16k") == (
        "layer_10/width_16k of user/repo at commit 1 holds 2 SAEs: layer_10/width_16k/average_l0_9, "
        "layer_10/width_16k/average_l0_77. Give the name or the folder of one of them: "
        "'layer_10/width_16k/average_l0_9', or user/repo/layer_10/width_16k/average_l0_9."
    )
    assert refusal(RUN, None) == (
        "user/repo at commit 1 holds 2 SAEs: kron, topk. Give the name or the folder of one of them: 'kron', or "
        "user/repo/saes/kron."
    )


def test_of_very_many_some_are_named() -> None:
    said = refusal([f"layer_{number}" for number in range(5000)], None)
    assert "holds 5000 SAEs: layer_0, layer_1, " in said
    assert ", layer_19 and 4,980 more. Give " in said
    assert len(said) < 500


@pytest.mark.parametrize("name", ["", "/", ".", "..", "../kron", "layer_1", "saes/kron/x"])
def test_names_of_none(name: str) -> None:
    said = refusal(RUN + SCOPE, name)
    assert said.startswith("name must be one of layer_2/width_16k/average_l0_9, ")
    assert f"for user/repo at commit 1; got {name!r}." in said


def test_a_name_that_is_near() -> None:
    assert refusal(RUN, "saelens/korn").endswith("got 'saelens/korn'. Did you mean 'saelens/kron'?")
