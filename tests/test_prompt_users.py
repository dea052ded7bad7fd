"""Whose taste a prompt asks for."""

import pytest

from visalign.types import Prompt
from visalign.users import asking, mixture_of, users_in, with_users


def test_a_user_is_a_name_a_number_a_mixture_or_nobody():
    asked = [mixture_of(Prompt("x", metadata=metadata)) for metadata in
             ({}, {"user": None}, {"user": "ann"}, {"user": 7}, {"user": {"ann": 0.3, "bob": 0.7}})]
    assert asked == [(), (), (("ann", 1.0),), (("7", 1.0),), (("ann", 0.3), ("bob", 0.7))]


@pytest.mark.parametrize("user", [{}, {"ann": "much"}, {"ann": float("nan")}, ["ann"], 0.5, True])
def test_anything_else_is_refused(user):
    with pytest.raises(ValueError, match="give a name, or finite weights by name"):
        mixture_of(Prompt("x", metadata={"user": user}))


def test_every_prompt_goes_to_every_user_and_keeps_what_else_it_says():
    prompts = [Prompt("one", negative="blurry", metadata={"shape": "disc", "user": "old"}), Prompt("two")]
    found = with_users(prompts, ["ann", {"ann": 0.5, "bob": 0.5}, None])
    assert [prompt.text for prompt in found] == ["one"] * 3 + ["two"] * 3
    assert [prompt.metadata.get("user") for prompt in found] == ["ann", {"ann": 0.5, "bob": 0.5}, None] * 2
    assert found[0].negative == "blurry"
    assert found[2].metadata == {"shape": "disc"}
    assert users_in(found) == ["ann", "bob"]
    assert asking(found[0], "bob").metadata["user"] == "bob"
    with pytest.raises(ValueError, match="at least one user"):
        with_users(prompts, [])
