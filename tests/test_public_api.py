"""The public names are locked: a change here is a change for every user.

To change one on purpose: edit ``__all__`` and ``_HOME`` in byol_deploy/__init__.py, the list below, and CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import inspect

import byol_deploy

NAMES = {
    "BYOL",
    "Bundle",
    "DeepLabV3Backbone",
    "Encoder",
    "LARS",
    "MLP",
    "NegativeCosineSimilarity",
    "OnDevice",
    "ParityReport",
    "Recipe",
    "evaluate",
    "export",
    "fit",
    "verify",
}


def test_the_list_is_locked() -> None:
    assert sorted(byol_deploy.__all__) == sorted(NAMES), __doc__
    assert len(byol_deploy.__all__) <= 15


def test_every_name_resolves_to_its_home_and_is_documented() -> None:
    for name in NAMES:
        value = getattr(byol_deploy, name)
        assert value.__module__.startswith("byol_deploy."), name
        assert inspect.getdoc(value), f"{name} has no docstring"
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_no_public_function_shares_its_modules_name() -> None:
    for name in NAMES:
        assert getattr(byol_deploy, name).__module__ != f"byol_deploy.{name}", name


def test_the_reference_signature_of_byol() -> None:
    parameters = inspect.signature(byol_deploy.BYOL.__init__).parameters
    positional = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name != "self"
    }
    assert positional == {
        "backbone": None,
        "projection_head": None,
        "prediction_head": None,
        "learning_rate": 0.001,
        "schedule": 90000,
        "criterion": None,
    }


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(byol_deploy, "no_such_name")
    assert set(NAMES) <= set(dir(byol_deploy))
