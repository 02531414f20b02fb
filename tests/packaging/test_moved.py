"""Names of 0.1: each still imports, and is what took its place."""

import importlib

import pytest

from dagr_ray.moved import MOVED, RENAMED


@pytest.mark.parametrize("home", RENAMED)
def test_a_renamed_function_answers_to_its_old_name(home):
    module = importlib.import_module(f"dagr_ray.{home}")
    for old, new in RENAMED[home].items():
        assert old not in vars(module) and getattr(module, old) is getattr(module, new)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_an_old_module_gives_a_renamed_function():
    homes = {home: old for old, places in MOVED.items() for home in places.split()}
    for home in RENAMED.keys() & homes.keys():
        for old, new in RENAMED[home].items():
            current = getattr(importlib.import_module(f"dagr_ray.{home}"), new)
            assert getattr(importlib.import_module(f"dagr_ray.{homes[home]}"), old) is current
