"""Test the conversion of configs to and from JSON, and that errors name the key."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.objective import AuxKConfig
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.support.config import differences, from_dict, to_dict
from kronsae.support.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Cat:
    kind: ClassVar[str] = "cat"
    lives: int = 9


@dataclass(frozen=True, kw_only=True)
class Dog:
    kind: ClassVar[str] = "dog"
    name: str

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("name must not be empty.")


@dataclass(frozen=True, kw_only=True)
class House:
    rooms: int
    price: float = 1.5
    open: bool = False
    street: str | None = None
    rent: float | None = None
    colour: Literal["red", "blue"] = "red"
    pet: Cat | Dog | None = None
    pets: tuple[Cat | Dog, ...] = ()
    cat: Cat = field(default_factory=Cat)
    sizes: tuple[int, ...] = ()
    number: int | str = 0


FULL = House(
    rooms=3,
    price=2.0,
    open=True,
    street="x",
    rent=0.5,
    colour="blue",
    pet=Dog(name="Rex"),
    pets=(Cat(lives=1), Dog(name="A")),
    cat=Cat(lives=2),
    sizes=(1, 2),
    number="3a",
)


def refusal(data: Any, cls: type[Any] = House) -> str:
    with pytest.raises(UserError) as error:
        from_dict(cls, data)
    return str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        FULL,
        House(rooms=1),
        Cat(),
        DenseEncoderConfig(d_sae=8),
        DenseEncoderConfig(d_sae=8, init_norm=0.1),
        KroneckerEncoderConfig(num_heads=2, d_base=3, d_extension=4, gate="mand_eps", init_norm=0.5),
        KroneckerEncoderConfig(num_heads=2, d_base=3, d_extension=4, null_symbols=True),
        TopKConfig(k=3),
        AuxKConfig(),
        AuxKConfig(weight=0.5, k_aux=7, dead_after_tokens=10),
        SAEConfig(d_in=4, encoder=DenseEncoderConfig(d_sae=8), sparsifier=TopKConfig(k=3)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_round_trip_through_json(config: Any) -> None:
    again = from_dict(type(config), json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert again == config
    assert to_dict(again) == to_dict(config)


def test_a_member_of_a_union_carries_its_kind() -> None:
    assert to_dict(FULL)["pet"] == {"kind": "dog", "name": "Rex"}
    assert to_dict(FULL)["pets"] == [{"kind": "cat", "lives": 1}, {"kind": "dog", "name": "A"}]


def test_defaults_fill_what_is_not_given() -> None:
    assert from_dict(House, {"rooms": 2}) == House(rooms=2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"rooms": 1, "prize": 2.0},
            "config.prize is not a known key of House. Did you mean 'price'? Known keys: rooms, price, open, street, "
            "rent, colour, pet, pets, cat, sizes, number.",
        ),
        (
            {"rooms": 1, "cat": {"kind": "cat", "live": 3}},
            "config.cat.live is not a known key of Cat. Did you mean 'li",
        ),
        ({"rooms": 1, "zzzzzz": 2.0}, "config.zzzzzz is not a known key of House. Known keys: rooms,"),
        ({"rooms": 1, 5: 2.0}, "config.5 is not a known key of House. Known keys: rooms,"),
        ({}, "config.rooms is missing; House needs it."),
        ({"rooms": 1, "pet": {"kind": "dog"}}, "config.pet.name is missing; Dog needs it."),
        ({"rooms": "1"}, "config.rooms must be int; got '1'."),
        ({"rooms": 1.0}, "config.rooms must be int; got 1.0."),
        ({"rooms": None}, "config.rooms must be int; got None."),
        ({"rooms": True}, "config.rooms must be int; got True."),
        ({"rooms": 1, "price": True}, "config.price must be float; got True."),
        ({"rooms": 1, "price": "1.0"}, "config.price must be float; got '1.0'."),
        ({"rooms": 1, "open": 1}, "config.open must be bool; got 1."),
        ({"rooms": 1, "street": 5}, "config.street must be str; got 5."),
        ({"rooms": 1, "rent": "low"}, "config.rent must be float; got 'low'."),
        ({"rooms": 1, "colour": "green"}, "config.colour must be one of 'red', 'blue'; got 'green'."),
        ({"rooms": 1, "colour": ["red"]}, "config.colour must be one of 'red', 'blue'; got ['red']."),
        ({"rooms": 1, "sizes": 3}, "config.sizes must be a list; got 3."),
        ({"rooms": 1, "sizes": "12"}, "config.sizes must be a list; got '12'."),
        ({"rooms": 1, "sizes": [1, "2"]}, "config.sizes[1] must be int; got '2'."),
        ({"rooms": 1, "number": 1.5}, "config.number must be int; got 1.5."),
        (
            {"rooms": 1, "pet": {"kind": "dgo", "name": "A"}},
            "config.pet.kind must be one of 'cat', 'dog'; got 'dgo'. Did",
        ),
        ({"rooms": 1, "pet": {"name": "A"}}, "config.pet.kind must be one of 'cat', 'dog'; got None."),
        ({"rooms": 1, "pet": {"kind": ["cat"]}}, "config.pet.kind must be one of 'cat', 'dog'; got ['cat']."),
        ({"rooms": 1, "pet": "cat"}, "config.pet.kind must be one of 'cat', 'dog'; got None."),
        ({"rooms": 1, "pets": [{"kind": "cow"}]}, "config.pets[0].kind must be one of 'cat', 'dog'; got 'cow'."),
        ({"rooms": 1, "cat": {"lives": 3}}, "config.cat.kind must be 'cat'; got None."),
        ({"rooms": 1, "cat": {"kind": "dog"}}, "config.cat.kind must be 'cat'; got 'dog'."),
        ({"rooms": 1, "cat": 3}, "config.cat must be a mapping of Cat fields; got 3."),
        ({"rooms": 1, "kind": "house"}, "config.kind must be None; got 'house'."),
        ({"rooms": 1, "pet": {"kind": "dog", "name": ""}}, "name must not be empty."),
        ([], "config must be a mapping of House fields; got []."),
        (None, "config must be a mapping of House fields; got None."),
    ],
)
def test_refusals(data: Any, message: str) -> None:
    assert refusal(data).startswith(message)


def test_the_place_can_be_named() -> None:
    with pytest.raises(UserError, match=r"^run\.json: sae\.rooms is missing"):
        from_dict(House, {}, where="run.json: sae")


def test_an_int_is_a_float_and_a_list_is_a_tuple() -> None:
    house = from_dict(House, {"rooms": 1, "price": 2, "rent": 3, "sizes": [1, 2]})
    assert (house.price, house.rent, house.sizes) == (2.0, 3.0, (1, 2))
    assert isinstance(house.price, float)
    assert isinstance(house.rent, float)


def test_what_is_given_is_not_changed() -> None:
    data = to_dict(FULL)
    before = json.dumps(data)
    from_dict(House, data)
    assert json.dumps(data) == before


def test_differences_name_each_leaf() -> None:
    old = to_dict(FULL)
    new = to_dict(
        House(rooms=4, price=2.0, open=True, street="x", pet=Dog(name="Max"), pets=(Cat(), Dog(name="A")), sizes=(1,))
    )
    assert differences(old, old) == []
    assert differences(old, new) == [
        "rooms: 3 -> 4",
        "rent: 0.5 -> None",
        "colour: 'blue' -> 'red'",
        "pet.name: 'Rex' -> 'Max'",
        "pets[0].lives: 1 -> 9",
        "cat.lives: 2 -> 9",
        "sizes: [1, 2] -> [1]",
        "number: '3a' -> 0",
    ]


def test_differences_see_keys_on_either_side() -> None:
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == ["a: 1 -> None", "b: 2 -> 3", "c: None -> 4"]


def test_nearest() -> None:
    assert nearest("layer", ["layers", "tokens"]) == " Did you mean 'layers'?"
    assert nearest("zzz", ["layers", "tokens"]) == ""
    assert nearest("zzz", []) == ""
